"""Where Polygraft keeps what it builds or fetches once for each user."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import platformdirs

from polygraft.errors import ConfigError

VARIABLE = "POLYGRAFT_CACHE"


def cache_dir() -> Path:
    """`POLYGRAFT_CACHE`, or the platform's cache directory for this user; an empty variable counts as unset.

    Raises:
        ConfigError: there is neither, since the user has no home.
    """
    if override := os.environ.get(VARIABLE):
        return Path(override).expanduser()
    # platformdirs would turn an unknown home into a folder named ~ in the working directory.
    if not os.environ.get("XDG_CACHE_HOME") and not os.environ.get("HOME"):
        return _home() / ".cache" / "polygraft"
    return Path(platformdirs.user_cache_dir("polygraft"))


def _home() -> Path:
    """The home in the system's user database, for when HOME isn't set."""
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        raise ConfigError(
            VARIABLE, f"set it to a folder for the cache: HOME isn't set, and user {os.getuid()} has no home"
        ) from None
