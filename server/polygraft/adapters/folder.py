"""Reads an adapter's folder into memory, trusting nothing in it."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from polygraft.adapters.adapterhub.form import (
    ADAPTERHUB_PICKLE,
    ADAPTERHUB_WEIGHTS,
    HAS_HEAD,
    HEAD_CONFIG,
    is_adapterhub,
)
from polygraft.errors import AdapterInvalid, InvalidRequest

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", ADAPTERHUB_PICKLE, "adapter_model.pt")
MAX_CONFIG_BYTES = 2**20
TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""What an adapter may bring along to be talked to in its own way."""
MAX_TOKENIZER_BYTES = 2**26


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """An adapter's files, read but not yet understood.

    Args:
        weights: the bytes of its safetensors file. In memory rather than mapped: a file that shrinks
            under a mapping kills the process.
        content_hash: SHA-256 over configuration, weights and texts, in hexadecimal.
        texts: those of `TOKENIZER_FILES` that it has.
        weights_file: name of the file with the weights.
    """

    name: str
    config: dict[str, Any]
    weights: bytes
    content_hash: str
    texts: Mapping[str, bytes] = field(default_factory=dict)
    weights_file: str = WEIGHTS

    @property
    def disk_bytes(self) -> int:
        """Bytes of its weights on disk."""
        return len(self.weights)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The file's tensors. Raises AdapterInvalid if it isn't whole."""
        try:
            return load_safetensors(self.weights)
        except (SafetensorError, ValueError, KeyError) as error:
            raise AdapterInvalid(self.name, [f"{self.weights_file} can't be read: {error}"]) from None


class AdapterStore:
    """A folder whose sub-folders are adapters. Nothing outside it is ever read.

    Args:
        root: the folder, or None for a server without one.
        max_bytes: the largest weights file that is read.
    """

    def __init__(self, root: Path | None, max_bytes: int) -> None:
        self._root = None if root is None else root.resolve()
        self._max_bytes = max_bytes

    def names(self) -> list[str]:
        """The sub-folders that can be adapters; hidden ones and Python's are none."""
        if self._root is None:
            return []
        return sorted(
            entry.name
            for entry in self._root.iterdir()
            if entry.is_dir() and not entry.name.startswith((".", "_"))
        )

    def read(self, name: str, source: str) -> AdapterFolder:
        """Read one folder; blocks on the disk.

        Args:
            source: relative to the store.

        Raises:
            InvalidRequest: `source` leads out of the store, or there is no store.
            AdapterInvalid: it isn't a folder that can be an adapter's.
        """
        if self._root is None:
            raise InvalidRequest("source", "this server has no store (--adapters)")
        relative = PurePosixPath(source)
        if relative.is_absolute() or ".." in relative.parts or "\0" in source or not relative.parts:
            raise InvalidRequest("source", f"must be a folder below the store, got {source[:200]!r}")
        folder = self._root / relative
        self._check_inside(folder, source)
        if not os.path.isdir(folder):  # unlike Path.is_dir, False for a name that is too long
            raise AdapterInvalid(name, [f"no such folder in the store: {source[:200]}"])
        return read_folder(name, folder, self._max_bytes, check=lambda path: self._check_inside(path, source))

    def _check_inside(self, path: Path, source: str) -> None:
        assert self._root is not None
        try:
            inside = path.resolve().is_relative_to(self._root)
        except (OSError, RuntimeError):  # RuntimeError: a symlink that leads to itself, before Python 3.13
            inside = False
        if not inside:
            raise InvalidRequest("source", f"leads out of the store: {source[:200]!r}")


def read_folder(name: str, folder: Path, max_bytes: int, check: Any = None) -> AdapterFolder:
    """Read configuration and weights of a folder that PEFT or AdapterHub's library saved.

    Args:
        check: called with each file's path before it is opened; raises to refuse it.

    Raises:
        AdapterInvalid: a file is missing, too large, not what it should be, or a pickle.
    """
    config, _ = read_config(name, folder, check)
    weights_file = ADAPTERHUB_WEIGHTS if is_adapterhub(config) else WEIGHTS
    if weights_file == ADAPTERHUB_WEIGHTS and os.path.exists(folder / HEAD_CONFIG):
        raise AdapterInvalid(name, [HAS_HEAD])
    if not os.path.exists(folder / weights_file):
        for pickle in PICKLES:
            if os.path.exists(folder / pickle):
                raise AdapterInvalid(
                    name,
                    [
                        f"{pickle} is a pickle, which can run code when it is read; convert the folder with "
                        "`polygraft adapters convert FOLDER OUT`, or save the adapter again with "
                        f"{'use_safetensors' if is_adapterhub(config) else 'safe_serialization'}=True"
                    ],
                )
    weights = read_file(name, folder / weights_file, max_bytes, check)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    digest.update(weights)
    texts = {
        file: read_file(name, folder / file, MAX_TOKENIZER_BYTES, check)
        for file in TOKENIZER_FILES
        if os.path.exists(folder / file)
    }
    for file, content in texts.items():
        digest.update(file.encode())
        digest.update(content)
    return AdapterFolder(name, config, weights, digest.hexdigest(), texts, weights_file)


def read_config(name: str, folder: Path, check: Any = None) -> tuple[dict[str, Any], bytes]:
    """A folder's configuration, parsed and as it is. Raises AdapterInvalid if there is none."""
    raw = read_file(name, folder / CONFIG, MAX_CONFIG_BYTES, check)
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, a number of 5000 digits
        raise AdapterInvalid(name, [f"{CONFIG} is not JSON: {error}"]) from None
    if not isinstance(config, dict):
        raise AdapterInvalid(name, [f"{CONFIG} must hold an object"])
    return config, raw


def read_file(name: str, path: Path, max_bytes: int, check: Any) -> bytes:
    """A file's content, if it is a file of at most so many bytes; else raises AdapterInvalid.

    Args:
        name: the adapter's, for the error.
        check: called with the path before it is opened; raises to refuse it.
    """
    if check is not None:
        check(path)
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise AdapterInvalid(name, [f"{path.name} is not a file"])
            if status.st_size > max_bytes:
                raise AdapterInvalid(
                    name, [f"{path.name} has {status.st_size} bytes, the limit is {max_bytes}"]
                )
            return file.read(max_bytes)
    except FileNotFoundError:
        raise AdapterInvalid(name, [f"{path.name} is missing"]) from None
    except OSError as error:
        raise AdapterInvalid(name, [f"{path.name} can't be read: {error.strerror}"]) from None


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for a pipe's writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
