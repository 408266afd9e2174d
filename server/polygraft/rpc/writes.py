"""Sends the messages of streams, and notices when nobody reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from polygraft.errors import OutputUnread

Context = grpc.aio.ServicerContext[Any, Any]


class Writes:
    """The messages of all streams that are being sent.

    gRPC accepts a message once the caller's connection has room for it, so a message that stays is one that
    nobody reads. One timer watches them all: a timer for each would cost the loop more than the message.

    Args:
        timeout: seconds that sending a message may take.
        overdue: called for each message that took longer.
    """

    def __init__(self, timeout: float, overdue: Callable[[], None]) -> None:
        self._timeout = timeout
        self._note = overdue
        # When each sending task began, oldest first.
        self._sending: dict[asyncio.Task[Any], float] = {}
        self._overdue: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def send(self, context: Context, message: Any) -> None:
        """Send a message. Raises OutputUnread if that takes too long."""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        self._sending[task] = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(self._timeout, self._look, loop)
        try:
            await context.write(message)
        except asyncio.CancelledError:
            # If the call itself was cancelled meanwhile, there is nobody left to tell.
            if task in self._overdue and task.uncancel() == 0:
                self._note()
                raise OutputUnread(f"nobody read any output for {self._timeout:g} s") from None
            raise
        finally:
            del self._sending[task]
            self._overdue.discard(task)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        for task, began in self._sending.items():
            due = began + self._timeout
            if due > loop.time():
                self._timer = loop.call_at(due, self._look, loop)
                return
            if task not in self._overdue:
                self._overdue.add(task)
                task.cancel()
