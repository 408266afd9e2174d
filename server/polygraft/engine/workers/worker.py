"""Runs work on a thread of its own, off the event loop."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from polygraft.errors import PolygraftError, ResourceExhausted

T = TypeVar("T")


class Worker:
    """One thread and one queue: calls run one after another, in arrival order.

    Every busy thread beside the engine slows its steps down, so there are few of these, and none runs two
    calls at once. The thread is a daemon: a call that never returns can't keep the process from ending.

    Args:
        name: of the thread, in logs and stacks.
        max_waiting: most calls that may wait for their turn.
    """

    def __init__(self, name: str, max_waiting: int) -> None:
        self._name = name
        self._max_waiting = max_waiting
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def run(self, call: Callable[[], T], *, release: Callable[[T], None] | None = None) -> T:
        """Run a call and return its result. Must be called on the event loop's thread.

        Args:
            release: gets the result if the caller was cancelled meanwhile; may run on any thread.

        Raises:
            ResourceExhausted: too many calls are waiting already.
            PolygraftError: the call raised something that isn't an Exception, such as a Rust panic.
            Exception: whatever else the call raised.
        """
        waiting = self._calls.qsize()
        if waiting >= self._max_waiting:
            raise ResourceExhausted(f"{waiting} {self._name} are waiting, the limit is {self._max_waiting}")
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        done: Future[T] = Future()
        self._calls.put(lambda: complete(done, call))
        return await outcome(done, release)

    def _run(self) -> None:
        while True:
            self._calls.get()()


async def outcome(done: Future[T], release: Callable[[T], None] | None) -> T:
    """The result of a call on another thread; see `Worker.run`."""
    try:
        # A caller that is cancelled takes its call out of the queue, if it hasn't begun.
        return await asyncio.wrap_future(done)
    except asyncio.CancelledError:
        if release is not None:
            done.add_done_callback(lambda lost: _release(lost, release))
        raise


def complete(done: Future[T], call: Callable[[], T]) -> None:
    """Run a call and set its result or error on a future."""
    if not done.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except Exception as error:  # noqa: BLE001 - handed to whoever waits
        done.set_exception(error)
    except BaseException as error:  # noqa: BLE001 - on the loop's thread a SystemExit would end the loop
        failed = PolygraftError(f"{type(error).__name__}: {error}")
        failed.__cause__ = error
        done.set_exception(failed)
    else:
        done.set_result(result)


def _release(lost: Future[T], release: Callable[[T], None]) -> None:
    if not lost.cancelled() and lost.exception() is None:
        release(lost.result())
