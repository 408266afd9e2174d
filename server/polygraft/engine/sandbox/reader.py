"""Reads adapters' tokenizers in a worker first, so that a malicious file hits the libraries there."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tokenizers import Tokenizer

from polygraft.base.tokenizer import TextTokenizer, tokenizer_of
from polygraft.engine.sandbox.parts import parts_of
from polygraft.engine.sandbox.pool import Workers
from polygraft.engine.sandbox.process import WorkerStopped, WorkerUnavailable
from polygraft.engine.sandbox.serving import WorkerEncoder
from polygraft.errors import AdapterInvalid, ResourceExhausted
from polygraft.panics import is_panic

_MOST_REMEMBERED = 256


class TokenizerReader:
    """Makes tokenizers from files. May be called on any thread; blocks while the worker reads.

    Args:
        base: the base's own, whose parts are trusted.
    """

    def __init__(self, base: TextTokenizer, workers: Workers) -> None:
        self._parts = parts_of(base.backend)
        self._workers = workers
        self._refused: dict[str, tuple[str, ...]] = {}
        self._lock = threading.Lock()

    def __call__(self, name: str, files: Mapping[str, bytes]) -> TextTokenizer:
        """The tokenizer of these files, tried on texts of many kinds.

        Args:
            name: the adapter's, for errors.
            files: as `read_tokenizer` takes them.

        Raises:
            AdapterInvalid: they can't be read, or the tokenizer fails or isn't safe to serve.
            ResourceExhausted: no worker can be started.
        """
        key = _key_of(files)
        with self._lock:
            refused = self._refused.get(key)
        if refused is not None:
            raise AdapterInvalid(name, refused)
        try:
            return self._read(name, files)
        except AdapterInvalid as error:
            with self._lock:
                self._refused[key] = error.problems
                if len(self._refused) > _MOST_REMEMBERED:
                    self._refused.pop(next(iter(self._refused)))
            raise

    def _read(self, name: str, files: Mapping[str, bytes]) -> TextTokenizer:
        try:
            answer = self._workers.read(files, self._parts)
        except WorkerStopped as error:
            raise AdapterInvalid(name, [f"its tokenizer {error.problem}"]) from error
        except WorkerUnavailable as error:
            raise ResourceExhausted(f"no process to read tokenizers can be started: {error}") from error
        found = answer.header
        match found.get("failed"):
            case "invalid":
                raise AdapterInvalid(name, [str(problem) for problem in found["problems"]])
            case "memory":
                raise AdapterInvalid(name, ["its tokenizer needs more memory than allowed"])
            case str():
                raise AdapterInvalid(name, [f"its tokenizer fails: {found.get('problem')}"])
        core = answer.parts["core"]
        tokenizer = tokenizer_of(
            _parsed(name, core),
            special_tokens=_texts(found["special_tokens"]),
            chat_templates=_texts(found["chat_templates"]),
            encoder=WorkerEncoder(core, self._workers) if found["needs_worker"] else None,
        )
        return replace(tokenizer, warnings=tuple(map(str, found["warnings"])))


def _parsed(name: str, core: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_str(core.decode())
    except Exception as error:  # noqa: BLE001 - tokenizers raises bare Exception
        raise AdapterInvalid(name, [f"its tokenizer can't be read: {error}"]) from None
    except BaseException as error:
        if not is_panic(error):
            raise
        raise AdapterInvalid(name, [f"its tokenizer can't be read: {error}"]) from None


def _texts(found: Any) -> dict[str, Any]:
    """Special tokens or templates from a worker: texts, or lists of texts, by name."""
    assert isinstance(found, dict)
    return found


def _key_of(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for file, content in sorted(files.items()):
        digest.update(b"%s\0%d\0" % (file.encode(), len(content)))
        digest.update(content)
    return digest.hexdigest()
