"""The one thread that computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class EngineThread:
    """Runs calls one after another on a thread of its own.

    The base must be loaded on it and not only run: OpenMP keeps a team of threads for every thread that has
    ever computed, and as soon as the teams together outnumber the cores, none of them waits by spinning any
    more. Every operator then pays for waking threads: on two cores a mixed step took 107 ms instead of 65.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # A daemon, so that a process whose engine hangs can still end.
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Run a call when those before it have ended."""
        done: Future[T] = Future()

        def run() -> None:
            # From here on a caller that stops waiting can't cancel it.
            if not done.set_running_or_notify_cancel():
                return
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits
                done.set_exception(error)
            else:
                done.set_result(result)

        self._calls.put(run)
        return done

    def _run(self) -> None:
        while True:
            self._calls.get()()
