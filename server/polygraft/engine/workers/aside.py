"""Waits for a call on another thread without blocking the engine's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")

_GLANCE_SECONDS = 0.001
"""How long each check waits, so that the engine's thread doesn't spin while it has nothing else to do."""


def aside(call: Callable[[], T], name: str) -> Generator[None, None, T]:
    """Run a call that blocks on a process or a disk on a thread of its own. A job yields from this until the
    call is done.

    Args:
        name: of the thread. It is a daemon, so the server may end meanwhile.

    Raises: what the call does.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:  # noqa: BLE001 - handed to the waiting job
            done.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    while not done.done():
        wait([done], _GLANCE_SECONDS)
        yield None
    return done.result()
