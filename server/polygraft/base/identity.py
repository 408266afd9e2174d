"""Decides whether the base that an adapter names is the served one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from polygraft.core.cache_dir import cache_dir
from polygraft.errors import ConfigError

_SNAPSHOT = re.compile(r"(?:^|/)models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$")
"""A model's folder in the hub's cache."""
_SUFFIXES = re.compile(r"(?:-[0-9a-f]{8}-\d+|-unsloth-bnb-4bit|-bnb-4bit)$")
"""Endings of model names: of this package's own cache, and of copies of the same weights in 4 bits."""
CONFIGURATION, VOCABULARY = "config.json", "tokenizer.json"
_MOST_BYTES = 2**25
_INCIDENTAL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures")
"""Keys of config.json that may differ between copies of the same model."""


def is_same_base(trained_on: str, name: str, folder: str) -> bool:
    """Return whether an adapter's base is the served one: by name, or else by content.

    A path in an adapter's configuration is followed only next to the base's own folder and in this package's
    cache, so that an adapter can't make the server read other files.

    Args:
        trained_on: what the adapter names: a hub id, or a path on the machine that trained it.
        name: the served base's hub id or folder name.
        folder: the served base's folder; "" if it is on no disk.
    """
    if _bare(trained_on) == _bare(name):
        return True
    if not folder or "\0" in trained_on:
        return False
    there, here = Path(os.path.realpath(trained_on)), Path(os.path.realpath(folder))
    if there == here:
        return True
    if not any(there.is_relative_to(root) for root in _roots(here)) or not there.is_dir():
        return False
    try:
        # Sizes first: they differ for nearly all other models, and cost nothing.
        return _sizes(there) == _sizes(here) and _content(there) == _content(here)
    except (OSError, ValueError, RecursionError):  # one of them isn't a model's folder
        return False


def _bare(name: str) -> str:
    """Return a model's name without its owner, path, revision and ending."""
    name = name.strip().rstrip("/")
    if found := _SNAPSHOT.search(name):
        name = found[2]
    return _SUFFIXES.sub("", name.rpartition("/")[2].casefold())


def _roots(folder: Path) -> list[Path]:
    """Return the folders below which an adapter's path is followed; never the whole file system."""
    roots = [] if folder.parent == folder.parent.parent else [folder.parent]
    with contextlib.suppress(ConfigError):  # there is no cache
        roots.append(Path(os.path.realpath(cache_dir())))
    return roots


def _sizes(folder: Path) -> dict[str, int]:
    files = (folder / VOCABULARY, *folder.glob("*.safetensors"))
    return {path.name: path.stat().st_size for path in files}


def _content(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Read a model's configuration and vocabulary. Raises OSError, ValueError, RecursionError."""
    config = json.loads(_read(folder / CONFIGURATION))
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIGURATION} holds no object")
    return {key: value for key, value in config.items() if key not in _INCIDENTAL}, _read(folder / VOCABULARY)


def _read(path: Path) -> bytes:
    # Don't wait for a pipe's writer: there may never be one.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            raise OSError(f"{path} isn't a file of a model")
        return file.read(_MOST_BYTES)
