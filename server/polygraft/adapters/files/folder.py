"""An adapter's folder in memory, trusting nothing in it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polygraft.adapters.files.adapterhub_form import (
    ADAPTERHUB_PICKLE,
    ADAPTERHUB_WEIGHTS,
    HAS_HEAD,
    HEAD_CONFIG,
    is_adapterhub,
)
from polygraft.adapters.files.diagnosis import diagnose_file
from polygraft.adapters.files.open_folder import FileUnreadable, FolderChanged, OpenFolder, read_descriptor
from polygraft.base.tokenizer import TOKENIZER, VOCABULARIES
from polygraft.errors import AdapterInvalid, PolygraftError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
BASE_CONFIG = "config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", ADAPTERHUB_PICKLE, "adapter_model.pt")
MAX_CONFIG_BYTES = 2**20
TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    *VOCABULARIES,
    "chat_template.jinja",
    "generation_config.json",
)
"""What an adapter may bring along to be talked to in its own way."""
MAX_TOKENIZER_BYTES = 2**26


MAX_HEADER_BYTES = 2**22
"""Limit of the weights file's header, which has its tensors' names and shapes."""
_CUT_SHORT = ("not fully covered", "IncompleteBuffer", "invalid header length", "header too small")
"""Parts of safetensors' messages about files of the wrong length."""
MAX_TENSORS = 2**15
"""Only LoRAs that are saved expert by expert have more, and those aren't served anyway."""


class Weights:
    """The bytes of a weights file. They are read rather than mapped, since a mapped file that shrinks kills
    the process."""

    def __init__(self, content: bytes) -> None:
        self._content: bytes | None = content
        self.size = len(content)

    def take(self) -> bytes:
        """The bytes, which aren't kept here: beside the tensors they would be in memory twice."""
        content, self._content = self._content, None
        assert content is not None, "taken already"
        return content


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """An adapter's files, read but not yet understood.

    Args:
        weights: of its safetensors file.
        content_hash: SHA-256 over configuration, weights and texts, in hexadecimal.
        texts: those of `TOKENIZER_FILES` that it has.
        weights_file: name of the file with the weights.
    """

    name: str
    config: dict[str, Any]
    weights: Weights
    content_hash: str
    texts: Mapping[str, bytes] = field(default_factory=dict)
    weights_file: str = WEIGHTS

    @property
    def disk_bytes(self) -> int:
        """Bytes of its weights on disk."""
        return self.weights.size

    def take_tensors(self) -> dict[str, torch.Tensor]:
        """The file's tensors; may be called once. Raises AdapterInvalid if it is truncated or too large."""
        # Imported here because it imports torch, which the workers that import this module don't need.
        from safetensors import SafetensorError
        from safetensors.torch import load as load_safetensors

        content = self.weights.take()
        with untrusted(self.name, self.weights_file):
            header = int.from_bytes(content[:8], "little")
            if len(content) >= 8 and MAX_HEADER_BYTES < header <= len(content):
                problem = (
                    f"{self.weights_file} has a header of {header} bytes, the limit is {MAX_HEADER_BYTES}"
                )
                raise AdapterInvalid(self.name, [problem])
            try:
                tensors = load_safetensors(content)
            except SafetensorError as error:
                if not any(word in str(error) for word in _CUT_SHORT):
                    raise
                problem = (
                    f"{self.weights_file} is cut short or damaged: it has {len(content)} bytes, and its "
                    "header says another number; copy it again"
                )
                raise AdapterInvalid(self.name, [problem]) from None
        if len(tensors) > MAX_TENSORS:
            problem = f"{self.weights_file} has {len(tensors)} tensors, the limit is {MAX_TENSORS}"
            raise AdapterInvalid(self.name, [problem])
        return tensors


@contextmanager
def untrusted(name: str, what: str) -> Iterator[None]:
    """Refuse an adapter for whatever goes wrong while part of its folder is parsed.

    On hostile input libraries raise errors of any kind, RecursionError, OverflowError and MemoryError
    included, and Rust libraries panic, which isn't even an Exception.

    Raises:
        AdapterInvalid: with the reason.
    """
    try:
        yield
    except (PolygraftError, StopIteration, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        why = str(error).strip() or type(error).__name__
        # It may also be a bug of ours.
        log.warning("adapter %s is refused because of an unexpected error", name, exc_info=error)
        raise AdapterInvalid(name, [f"{what} can't be read: {why}"]) from None


def folder_bytes(folder: OpenFolder) -> int:
    """Bytes of all files that `read_open_folder` reads."""
    files = (CONFIG, WEIGHTS, ADAPTERHUB_WEIGHTS, *TOKENIZER_FILES)
    return sum(folder.size(file) for file in files)


def read_open_folder(name: str, folder: OpenFolder, max_bytes: int) -> AdapterFolder:
    """Read configuration and weights of a folder that PEFT or AdapterHub's library saved.

    Args:
        max_bytes: the largest weights file that is read.

    Raises:
        AdapterInvalid: a file is missing, too large, not what it should be, or a pickle.
        OutsideStore, FolderChanged.
    """
    try:
        return _read(name, folder, max_bytes)
    except FileUnreadable as error:
        raise AdapterInvalid(name, [str(error)]) from None


def _read(name: str, folder: OpenFolder, max_bytes: int) -> AdapterFolder:
    if not folder.has(CONFIG):
        raise AdapterInvalid(name, [_no_configuration(folder)])
    config = parse_config(name, folder.read(CONFIG, MAX_CONFIG_BYTES))
    weights_file = ADAPTERHUB_WEIGHTS if is_adapterhub(config) else WEIGHTS
    if weights_file == ADAPTERHUB_WEIGHTS and folder.has(HEAD_CONFIG):
        raise AdapterInvalid(name, [HAS_HEAD])
    if not folder.has(weights_file):
        for pickle in PICKLES:
            if folder.has(pickle):
                raise AdapterInvalid(
                    name,
                    [
                        f"{pickle} is a pickle, which can run code when it is read; convert the folder with "
                        "`polygraft adapters convert FOLDER OUT`, or save the adapter again with "
                        f"{'use_safetensors' if is_adapterhub(config) else 'safe_serialization'}=True"
                    ],
                )
    weights = folder.read(weights_file, max_bytes)
    if wrong := diagnose_file(weights_file, weights):
        raise AdapterInvalid(name, [wrong])
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    digest.update(weights)
    texts = {file: folder.read(file, MAX_TOKENIZER_BYTES) for file in TOKENIZER_FILES if folder.has(file)}
    for file, content in texts.items():
        digest.update(file.encode())
        digest.update(content)
    return AdapterFolder(name, config, Weights(weights), digest.hexdigest(), texts, weights_file)


def _no_configuration(folder: OpenFolder) -> str:
    """Say what a folder without an adapter's configuration seems to be."""
    if below := folder.folders_with(CONFIG):
        shown = ", ".join(below[:3]) + (f" and {len(below) - 3} more" if len(below) > 3 else "")
        return f"{CONFIG} is missing here, but is in its sub-folders: {shown}. Load one of these"
    if folder.has(BASE_CONFIG):
        return f"{CONFIG} is missing, and {BASE_CONFIG} is there: it is a model's folder, not an adapter's"
    if folder.has(WEIGHTS):
        return f"{CONFIG} is missing: copy it from where {WEIGHTS} comes from"
    return f"{CONFIG} is missing: this is no adapter's folder as PEFT or AdapterHub saves it"


def parse_config(name: str, raw: bytes) -> dict[str, Any]:
    """A folder's configuration. Raises AdapterInvalid if it is none."""
    if wrong := diagnose_file(CONFIG, raw):
        raise AdapterInvalid(name, [wrong])
    try:
        config = json.loads(raw)
        # The hash is taken of this, so values that are nested too deep must fail here.
        json.dumps(config)
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, a number of 5000 digits
        raise AdapterInvalid(name, [f"{CONFIG} is not JSON: {error}"]) from None
    if not isinstance(config, dict):
        raise AdapterInvalid(name, [f"{CONFIG} must hold an object"])
    return config


def read_file(name: str, path: Path, max_bytes: int) -> bytes:
    """The content of a file, wherever it is. Raises AdapterInvalid if it isn't a file, or is too large.

    Args:
        name: the adapter's, for the error.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            return read_descriptor(file.fileno(), path.name, max_bytes)
    except FileUnreadable as error:
        problem = str(error)
    except FolderChanged:
        problem = f"{path.name} changes while it is being read"
    except FileNotFoundError:
        problem = f"{path.name} is missing"
    except OSError as error:
        problem = f"{path.name} can't be read: {error.strerror}"
    raise AdapterInvalid(name, [problem])


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for a pipe's writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
