"""Runs callers' commands on the engine's thread and waits for their answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

from polygraft.engine.engine_loop import EngineLoop
from polygraft.errors import PolygraftError

T = TypeVar("T")


class Commands:
    """One engine's unanswered commands. Belongs to the event loop's thread."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop
        self._unanswered: set[Future[Any]] = set()

    async def run(self, command: Callable[[Future[T]], None]) -> T:
        """Run a command between two steps and wait for its answer, which may come much later.

        Raises: what the command answers with, or the error of `end`.
        """
        done: Future[T] = Future()
        self._unanswered.add(done)
        done.add_done_callback(self._unanswered.discard)
        self._loop.post(lambda: command(done))
        # Shielded: a caller that gives up must not cancel what the engine is doing.
        answer = asyncio.wrap_future(done)
        answer.add_done_callback(_hear)
        return await asyncio.shield(answer)

    def end(self, error: PolygraftError) -> None:
        """Answer all with an error, since the engine's thread no longer will."""
        for done in list(self._unanswered):
            # The thread may come out of a hang and answer first.
            with contextlib.suppress(InvalidStateError):
                done.set_exception(error)


def _hear(answer: asyncio.Future[Any]) -> None:
    """Take an error off a future: where its caller has given up, nobody else does, and asyncio logs it as
    lost."""
    if not answer.cancelled():
        answer.exception()
