"""The workers of one server, and who may use which.

Templates and texts go through two lanes of one worker each; a file uses one lane at a time. One whose worker
had to be killed lately may use the second lane only, and only while nobody else does: it can hold up others
like it, and nobody else. Tokenizers are read by a third worker, since loads can wait.
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
"""What one chat or text may cost."""
TRIAL_CPU_SECONDS = 1.0
"""What a small chat may cost when an adapter is loaded."""
READ_CPU_SECONDS = 20.0
"""What reading and trying a tokenizer may cost. One of 260,000 tokens takes 4 s."""
WORKER_BYTES = 2**28
READER_BYTES = 3 * 2**29
WAIT_SECONDS = 10.0
"""How long a chat waits for a lane, and then for its answer: the machine may be busy."""
_READ_SECONDS = 300.0
REMEMBERED_SECONDS = 60.0
"""How long a file that had its worker killed keeps to the second lane."""
_MOST_REMEMBERED = 1024
_MOST_IDS_EACH = 64
_MOST_IDS_ADDED = 2**16


class Workers:
    """Asks workers. Its methods block, and may be called on any thread; workers are started as they are
    needed."""

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
        """A chat's `text`, or `failed` in the header, see `worker.py`.

        Raises:
            WorkerStopped: the template had its worker end.
            WorkerUnavailable: there is no worker.
            ResourceExhausted: all workers were busy for long.
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
            key: what `key_of` says of `core`, the tokenizer's JSON.

        Raises: as `render`.
        """
        question = Frame({"kind": "encode", "key": key, "special": special}, {"text": text.encode()})
        # Four bytes an id. A part of a tokenizer may make many ids of a character, but not without end.
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
        """What `read_and_try` makes of a folder's files.

        Raises:
            WorkerStopped, WorkerUnavailable.
        """
        question = Frame({"kind": "read", "base": base}, files)
        with self._reading:
            return self._reader.ask(
                question, cpu_seconds=READ_CPU_SECONDS, seconds=_READ_SECONDS, most_bytes=2**28
            )

    def end(self) -> None:
        """End all workers; they start again if they are asked."""
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
                    raise ResourceExhausted("the workers that render chat templates are busy")
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
        """A lane that is free for a file now. Raises ResourceExhausted for one that isn't to wait."""
        killed = self._killed.get(key)
        if killed is not None and time.monotonic() - killed < REMEMBERED_SECONDS:
            if self._users[1] is not None:
                raise ResourceExhausted(
                    "an earlier use of this chat template or tokenizer had to be stopped, and the worker "
                    "that is left for it is busy",
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
    """What stands for a template or a tokenizer: the hash of its content."""
    return hashlib.sha256(content).hexdigest()
