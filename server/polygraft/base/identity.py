"""Whether a base that an adapter names is the one that is served."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from polygraft.base.cache_dir import cache_dir
from polygraft.errors import ConfigError

_SNAPSHOT = re.compile(r"(?:^|/)models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$")
"""A model's folder in the hub's cache."""
_SUFFIXES = re.compile(r"(?:-[0-9a-f]{8}-\d+|-unsloth-bnb-4bit|-bnb-4bit)$")
"""What this package's own cache, and copies of the same weights in 4 bits, append to a model's name."""
_MOST_BYTES = 2**25
_INCIDENTAL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures")
"""Keys of config.json that say nothing about the model."""


def is_same_base(trained_on: str, name: str, folder: str) -> bool:
    """Whether an adapter's base is the served one, by name or else by content.

    A path in an adapter's configuration is only followed beside the base's own folder and in this package's
    cache: an adapter can't have other files read.

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
    return _content(there) is not None and _content(there) == _content(here)


def _bare(name: str) -> str:
    """A model's name without its owner, path, revision and form."""
    name = name.strip().rstrip("/")
    if found := _SNAPSHOT.search(name):
        name = found[2]
    return _SUFFIXES.sub("", name.rpartition("/")[2].casefold())


def _roots(folder: Path) -> list[Path]:
    roots = [folder.parent]
    with contextlib.suppress(ConfigError):  # there is no cache
        roots.append(Path(os.path.realpath(cache_dir())))
    return roots


def _content(folder: Path) -> tuple[Any, bytes, dict[str, int]] | None:
    """A model's configuration, vocabulary and sizes of its weights; None if the folder isn't a model's."""
    try:
        config = json.loads(_read(folder / "config.json"))
        vocabulary = _read(folder / "tokenizer.json")
        weights = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(config, dict):
        return None
    return {key: value for key, value in config.items() if key not in _INCIDENTAL}, vocabulary, weights


def _read(path: Path) -> bytes:
    if path.stat().st_size > _MOST_BYTES:
        raise OSError(f"{path} is too large")
    return path.read_bytes()
