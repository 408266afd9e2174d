"""The adapters that the demo serves unless it is given others."""

from __future__ import annotations

from pathlib import Path

import polygraft
from polygraft.errors import ConfigError

PROMPTS_FILE = "demo.json"


def sample_adapters() -> Path:
    """A clone's `adapters/`, or the few of them that a wheel carries (see `setup.py`).

    Raises:
        ConfigError: there are neither, as in a package that was put together by other means.
    """
    package = Path(polygraft.__file__).resolve().parent
    for folder in (package / "samples", package.parents[1] / "adapters"):
        if (folder / PROMPTS_FILE).is_file():
            return folder
    raise ConfigError("--adapters", "no sample adapters are installed; name a folder of adapters")
