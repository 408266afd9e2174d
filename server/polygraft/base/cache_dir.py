"""Where Polygraft keeps what it builds or fetches once for each user."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """`POLYGRAFT_CACHE`, or the platform's cache directory for this user."""
    override = os.environ.get("POLYGRAFT_CACHE")
    return Path(override) if override else Path(platformdirs.user_cache_dir("polygraft"))
