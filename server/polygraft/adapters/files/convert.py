"""Turns a folder whose weights are a pickle into one that can be served.

The pickle is read by a process of its own (`unpickle.py`); this one handles the configuration and the rest.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from polygraft.adapters.files.adapterhub_form import ADAPTERHUB_WEIGHTS, HAS_HEAD, HEAD_CONFIG, is_adapterhub
from polygraft.adapters.files.folder import (
    CONFIG,
    MAX_CONFIG_BYTES,
    MAX_TOKENIZER_BYTES,
    PICKLES,
    TOKENIZER_FILES,
    WEIGHTS,
    parse_config,
    read_file,
)
from polygraft.errors import AdapterInvalid, ConfigError

_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion wrote.

    Args:
        folder: the new one.
        pickle: the file that was read.
        weights: the file that was written.
        tensors: how many it holds.
        bytes: of that file.
    """

    folder: str
    pickle: str
    weights: str
    tensors: int
    bytes: int


def convert_folder(folder: Path, out: Path, max_bytes: int = 2**30) -> Conversion:
    """Write `out`, with the pickle of `folder` as safetensors, its configuration, and its tokenizer if any.

    AdapterHub's library saves a tensor under each name that it has in the model: one of them is kept, as its
    readers want. PEFT's readers want each name: the tensor is copied.

    Raises:
        ConfigError: `out` is there already.
        AdapterInvalid: the folder has no pickle, or one that isn't just tensors, or too large a one.
    """
    name = folder.resolve().name
    if out.exists() or out.is_symlink():
        raise ConfigError("OUT", f"{out} exists already")
    raw_config = read_file(name, folder / CONFIG, MAX_CONFIG_BYTES)
    config = parse_config(name, raw_config)
    from_adapterhub = is_adapterhub(config)
    weights = ADAPTERHUB_WEIGHTS if from_adapterhub else WEIGHTS
    if from_adapterhub and (folder / HEAD_CONFIG).exists():
        raise AdapterInvalid(name, [HAS_HEAD])
    if (folder / weights).exists():
        raise AdapterInvalid(name, [f"it has {weights}, so there is nothing to convert"])
    pickle = next((pickle for pickle in PICKLES if (folder / pickle).exists()), None)
    if pickle is None:
        raise AdapterInvalid(name, [f"it has none of {', '.join(PICKLES)}, so there is nothing to convert"])
    out.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place, so that it appears there whole or not at all.
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=out.parent) as aside:
        made = Path(aside) / "adapter"
        made.mkdir()
        aliases = "drop" if from_adapterhub else "copy"
        tensors = _unpickle(name, folder / pickle, made / weights, max_bytes, aliases)
        (made / CONFIG).write_bytes(raw_config)
        for file in TOKENIZER_FILES:
            if (folder / file).exists():
                (made / file).write_bytes(read_file(name, folder / file, MAX_TOKENIZER_BYTES))
        size = (made / weights).stat().st_size
        if out.exists():
            raise ConfigError("OUT", f"{out} exists already")
        shutil.move(made, out)
    return Conversion(str(out), pickle, weights, tensors, size)


def _unpickle(name: str, source: Path, target: Path, max_bytes: int, aliases: str) -> int:
    """Have the other process write the target; returns the number of its tensors."""
    command = [sys.executable, "-m", "polygraft.adapters.files.unpickle"]
    command += [str(source.absolute()), str(target.absolute()), str(max_bytes), aliases]
    try:
        done = subprocess.run(  # noqa: S603 - our own module, and no shell
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=False
        )
        answer = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        raise AdapterInvalid(name, [f"{source.name} took longer than {_SECONDS:.0f} s to read"]) from None
    except (ValueError, IndexError):
        problem = f"{source.name} ended the process that read it (exit status {done.returncode})"
        raise AdapterInvalid(name, [problem]) from None
    if done.returncode != 0:
        raise AdapterInvalid(name, answer["problems"])
    tensors: int = answer["tensors"]
    return tensors
