"""A server's workers, and which file may use which.

Two lanes with one worker each render templates and encode texts; a file uses one lane at a time, and files
that wait take turns. A file whose worker was recently killed may use only the second lane, and only if it is
free, so it can't hold up well-behaved ones. A third worker reads tokenizers, since loads can wait.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from polygraft.engine.sandbox.frames import Frame
from polygraft.engine.sandbox.process import WorkerProcess, WorkerStopped, WorkerTimedOut
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
"""How long a chat or text waits for a lane."""
_SECONDS_PER_CPU_SECOND = 12.0
"""How long an answer may take for each second of CPU time, since the machine may be busy: longer than the
worker's own timer, so that the CPU time decides about a file wherever it can."""
_READ_SECONDS = 300.0
REMEMBERED_SECONDS = 60.0
"""How long a file whose worker was killed may use only the second lane."""
_MOST_REMEMBERED = 1024
_MOST_IDS_EACH = 64
_MOST_IDS_ADDED = 2**16


class _Waiter:
    """A call that waits for a lane: `_grant` sets one of the two.

    Args:
        key: of the file.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.lane: int | None = None
        self.refused: ResourceExhausted | None = None


class Workers:
    """Asks workers, and starts them when needed. Its methods block, and may be called on any thread."""

    def __init__(self) -> None:
        self._lanes = (WorkerProcess(WORKER_BYTES), WorkerProcess(WORKER_BYTES))
        self._users: list[str | None] = [None, None]
        self._free = threading.Condition()
        self._waiting: list[_Waiter] = []
        self._turns = itertools.count(1)
        self._served: dict[str, int] = {}
        """The turn in which each file had a lane last."""
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
            ResourceExhausted: all workers stayed busy, or the answer didn't come in time.
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
                question,
                cpu_seconds=cpu_seconds,
                seconds=_SECONDS_PER_CPU_SECOND * cpu_seconds,
                most_bytes=4 * most_characters,
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
        seconds = _SECONDS_PER_CPU_SECOND * CPU_SECONDS
        with self._lane(key) as worker:
            answer = worker.ask(question, cpu_seconds=CPU_SECONDS, seconds=seconds, most_bytes=most)
            if answer.header.get("failed") == "unknown":
                keep = Frame({"kind": "keep", "key": key}, {"core": core})
                worker.ask(keep, cpu_seconds=READ_CPU_SECONDS, seconds=_READ_SECONDS, most_bytes=0)
                answer = worker.ask(question, cpu_seconds=CPU_SECONDS, seconds=seconds, most_bytes=most)
        if "ids" not in answer.parts:
            return answer
        ids = array("I")
        ids.frombytes(answer.parts["ids"])
        return ids.tolist()

    def read(self, files: Mapping[str, bytes], base: Mapping[str, Any]) -> Frame:
        """The answer of `read_and_try` for a folder's files.

        Raises:
            WorkerStopped, WorkerUnavailable.
            ResourceExhausted: the answer didn't come in time.
        """
        question = Frame({"kind": "read", "base": base}, files)
        with self._reading, _in_time():
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
        waiter = _Waiter(key)
        deadline = time.monotonic() + WAIT_SECONDS
        with self._free:
            self._waiting.append(waiter)
            try:
                self._grant()
                while waiter.lane is None:
                    left = deadline - time.monotonic()
                    if waiter.refused or left <= 0:
                        raise waiter.refused or ResourceExhausted(
                            "all workers for adapters' templates and tokenizers are busy"
                        )
                    self._free.wait(left)
            except BaseException:
                if waiter in self._waiting:
                    self._waiting.remove(waiter)
                raise
            lane = waiter.lane
        try:
            with _in_time():
                yield self._lanes[lane]
        except WorkerStopped:
            self._note_killed(key)
            raise
        finally:
            with self._free:
                self._users[lane] = None
                self._grant()

    def _grant(self) -> None:
        """Give free lanes to those that wait, first to the file whose last turn is longest ago."""
        for waiter in sorted(self._waiting, key=lambda waiter: self._served.get(waiter.key, 0)):
            try:
                lane = self._choose(waiter.key)
            except ResourceExhausted as error:
                waiter.refused = error
                lane = None
            if lane is None and waiter.refused is None:
                continue
            self._waiting.remove(waiter)
            if lane is not None:
                waiter.lane = lane
                self._users[lane] = waiter.key
                self._served.pop(waiter.key, None)
                self._served[waiter.key] = next(self._turns)
                if len(self._served) > _MOST_REMEMBERED:
                    self._served.pop(next(iter(self._served)))
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


@contextmanager
def _in_time() -> Iterator[None]:
    """Turn a missing answer that is nobody's fault into the caller's error."""
    try:
        yield
    except WorkerTimedOut as error:
        raise ResourceExhausted(
            f"a process for adapters' chat templates and tokenizers didn't answer in time ({error}): the "
            "machine is busy"
        ) from error


def key_of(content: bytes) -> str:
    """The hash that identifies a template or a tokenizer."""
    return hashlib.sha256(content).hexdigest()
