"""A server's workers, and which file may use which.

Two lanes with one worker each render templates and encode texts; a file uses one lane at a time. A file whose
worker was recently killed may use only the second lane, and only if it is free, so it can't hold up
well-behaved ones. A third worker reads tokenizers, since loads can wait.
"""

from __future__ import annotations

import hashlib
import threading
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from polygraft.engine.sandbox.frames import Frame
from polygraft.engine.sandbox.process import WorkerProcess, WorkerStopped
from polygraft.errors import ResourceExhausted

CPU_SECONDS = 2.0
"""Limit for one chat or text."""
TRIAL_CPU_SECONDS = 1.0
"""Limit for a small chat when an adapter is loaded."""
READ_CPU_SECONDS = 20.0
"""Limit for reading and trying a tokenizer. One of 260,000 tokens takes 4 s."""
WORKER_BYTES = 2**28
READER_BYTES = 3 * 2**29
WAIT_SECONDS = 10.0
"""How long a chat waits for a lane, and then for its answer, since the machine may be busy."""
_READ_SECONDS = 300.0
REMEMBERED_SECONDS = 60.0
"""How long a file whose worker was killed may use only the second lane."""
_MOST_REMEMBERED = 1024
_MOST_IDS_EACH = 64
_MOST_IDS_ADDED = 2**16


class Workers:
    """Asks workers, and starts them when needed. Its methods block, and may be called on any thread."""

    def __init__(self) -> None:
        self._lanes = (WorkerProcess(WORKER_BYTES), WorkerProcess(WORKER_BYTES))
        self._users: list[str | None] = [None, None]
        self._free = threading.Condition()
        self._killed: dict[str, float] = {}
        self._reader = WorkerProcess(READER_BYTES)
        self._reading = threading.Lock()

    def render(
        self,
        source: str,
        messages: Sequence[Mapping[str, str]],
        variables: Mapping[str, Any],
        most_characters: int,
        cpu_seconds: float = CPU_SECONDS,
    ) -> Frame:
        """A chat's `text` part, or `failed` in the header; see `worker.py`.

        Raises:
            WorkerStopped: the template ended its worker.
            WorkerUnavailable: no worker can be started.
            ResourceExhausted: all workers stayed busy.
        """
        question = Frame(
            {
                "kind": "render",
                "source": source,
                "messages": messages,
                "variables": variables,
                "most_characters": most_characters,
            }
        )
        with self._lane(key_of(source.encode())) as worker:
            return worker.ask(
                question, cpu_seconds=cpu_seconds, seconds=WAIT_SECONDS, most_bytes=4 * most_characters
            )

    def encode(self, key: str, core: bytes, text: str, *, special: bool) -> list[int] | Frame:
        """A text's ids, or a frame with `failed`.

        Args:
            key: `key_of(core)`, where `core` is the tokenizer's JSON.

        Raises: as `render`.
        """
        question = Frame({"kind": "encode", "key": key, "special": special}, {"text": text.encode()})
        # Four bytes per id. A tokenizer may make many ids of one character, but not without limit.
        most = 4 * (_MOST_IDS_ADDED + _MOST_IDS_EACH * len(text))
        with self._lane(key) as worker:
            answer = worker.ask(question, cpu_seconds=CPU_SECONDS, seconds=WAIT_SECONDS, most_bytes=most)
            if answer.header.get("failed") == "unknown":
                keep = Frame({"kind": "keep", "key": key}, {"core": core})
                worker.ask(keep, cpu_seconds=READ_CPU_SECONDS, seconds=_READ_SECONDS, most_bytes=0)
                answer = worker.ask(question, cpu_seconds=CPU_SECONDS, seconds=WAIT_SECONDS, most_bytes=most)
        if "ids" not in answer.parts:
            return answer
        ids = array("I")
        ids.frombytes(answer.parts["ids"])
        return ids.tolist()

    def read(self, files: Mapping[str, bytes], base: Mapping[str, Any]) -> Frame:
        """The answer of `read_and_try` for a folder's files.

        Raises:
            WorkerStopped, WorkerUnavailable.
        """
        question = Frame({"kind": "read", "base": base}, files)
        with self._reading:
            return self._reader.ask(
                question, cpu_seconds=READ_CPU_SECONDS, seconds=_READ_SECONDS, most_bytes=2**28
            )

    def end(self) -> None:
        """End all workers; the next question starts them again."""
        for worker in (*self._lanes, self._reader):
            worker.end()

    @contextmanager
    def _lane(self, key: str) -> Iterator[WorkerProcess]:
        """A worker for one question about a file."""
        deadline = time.monotonic() + WAIT_SECONDS
        with self._free:
            while (lane := self._choose(key)) is None:
                left = deadline - time.monotonic()
                if left <= 0 or not self._free.wait(left):
                    raise ResourceExhausted("all workers for adapters' templates and tokenizers are busy")
            self._users[lane] = key
        try:
            yield self._lanes[lane]
        except WorkerStopped:
            self._note_killed(key)
            raise
        finally:
            with self._free:
                self._users[lane] = None
                self._free.notify_all()

    def _choose(self, key: str) -> int | None:
        """A lane that is free for a file, or None. Raises ResourceExhausted for a file that may not wait."""
        killed = self._killed.get(key)
        if killed is not None and time.monotonic() - killed < REMEMBERED_SECONDS:
            if self._users[1] is not None:
                raise ResourceExhausted(
                    "this chat template or tokenizer had to be stopped recently, and the only worker that "
                    "it may use is busy",
                    CPU_SECONDS,
                )
            return 1
        if key in self._users:
            return None
        return next((lane for lane, user in enumerate(self._users) if user is None), None)

    def _note_killed(self, key: str) -> None:
        with self._free:
            self._killed.pop(key, None)
            self._killed[key] = time.monotonic()
            if len(self._killed) > _MOST_REMEMBERED:
                self._killed.pop(next(iter(self._killed)))
            self._free.notify_all()


def key_of(content: bytes) -> str:
    """The hash that identifies a template or a tokenizer."""
    return hashlib.sha256(content).hexdigest()
