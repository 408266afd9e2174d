"""A thread pool with a queue per key, so that a slow key doesn't hold up the others."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from polygraft.engine.workers.worker import complete, outcome
from polygraft.errors import ResourceExhausted

T = TypeVar("T")


class FairWorkers:
    """Some threads, and a queue for each key. Keys take turns, and each uses one thread at a time.

    The threads mostly wait for a worker process and compute little, so they don't slow the engine. They are
    daemons: a call that never returns can't keep the process from ending.

    Args:
        name: of the threads, in logs and stacks.
        threads: at most. All but one may hang before other keys have to wait.
        max_waiting: most calls of one key that may wait for their turn.
    """

    def __init__(self, name: str, threads: int, max_waiting: int) -> None:
        self._name = name
        self._most_threads = threads
        self._max_waiting = max_waiting
        self._threads = 0
        self._waiting: OrderedDict[str, deque[Callable[[], None]]] = OrderedDict()
        self._running: set[str] = set()
        self._changed = threading.Condition()

    async def run(self, key: str, call: Callable[[], T], *, release: Callable[[T], None] | None = None) -> T:
        """Run a call and return its result. Must be called on the event loop's thread.

        Args:
            key: whose call it is.
            release: as of `Worker.run`.

        Raises: as `Worker.run`.
        """
        done: Future[T] = Future()
        with self._changed:
            queue = self._waiting.setdefault(key, deque())
            if len(queue) >= self._max_waiting:
                raise ResourceExhausted(
                    f"{len(queue)} {self._name} of {key} are waiting, the limit is {self._max_waiting}"
                )
            queue.append(lambda: complete(done, call))
            if self._threads < self._most_threads:
                self._threads += 1
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
            self._changed.notify()
        return await outcome(done, release)

    def _run(self) -> None:
        while True:
            with self._changed:
                while (key := next((one for one in self._waiting if one not in self._running), None)) is None:
                    self._changed.wait()
                call = self._waiting[key].popleft()
                if self._waiting[key]:
                    self._waiting.move_to_end(key)
                else:
                    del self._waiting[key]
                self._running.add(key)
            call()
            with self._changed:
                self._running.discard(key)
                self._changed.notify()
