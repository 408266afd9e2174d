"""Memory that adapters take while they are being loaded, and who may take it next.

A load holds its files, their tensors and what is made of them at the same time. Thirty at once would hold
thirty times that, so a load waits until those before it have ended: before its files are read.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque

from polygraft.errors import ResourceExhausted

LOADS_AT_ONCE = 8
"""Loads that are on their way: their smoke tests share steps."""
MAX_WAITING = 256
"""Loads that may wait for others."""
_TIMES_THE_FILES = 4
"""What a load takes at its peak beside what its files have: these, their tensors, those in another type, and
the copy that stays."""
_LEAST = 2**20


class LoadMemory:
    """Counts what loads on their way take. May be used from any thread.

    Args:
        budget: bytes that they may take together; one that takes more goes alone.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._lock = threading.Lock()
        self._taken = 0
        self._loads = 0

    def take(self, file_bytes: int) -> Ticket | None:
        """Room for a load of so many bytes of files; None if there is none now."""
        needed = max(_LEAST, _TIMES_THE_FILES * file_bytes)
        with self._lock:
            fits = self._loads < LOADS_AT_ONCE and self._taken + needed <= self._budget
            if self._loads and not fits:
                return None
            self._taken += needed
            self._loads += 1
        return Ticket(self, needed)

    def _give(self, taken: int) -> None:
        with self._lock:
            self._taken -= taken
            self._loads -= 1


class Ticket:
    """Room for one load, until it is given back."""

    def __init__(self, memory: LoadMemory, taken: int) -> None:
        self._memory = memory
        self._taken: int | None = taken
        self.handed_over = False
        """Whether the load has begun, which gives the room back at its end whoever waits for it."""

    def give_back(self) -> None:
        """Let others have the room; once is enough, and more do nothing."""
        taken, self._taken = self._taken, None
        if taken is not None:
            self._memory._give(taken)


class LoadQueue:
    """Loads that wait for room, in the order in which they came. Belongs to the event loop's thread."""

    def __init__(self, memory: LoadMemory) -> None:
        self._memory = memory
        self._waiting: deque[tuple[int, asyncio.Future[Ticket]]] = deque()

    async def enter(self, file_bytes: int) -> Ticket:
        """Wait for room for a load of so many bytes of files. `leave` is to be called with the ticket.

        Raises:
            ResourceExhausted: too many wait already.
        """
        if not self._waiting and (ticket := self._memory.take(file_bytes)) is not None:
            return ticket
        if len(self._waiting) >= MAX_WAITING:
            raise ResourceExhausted(f"{MAX_WAITING} loads of adapters are waiting for others to end")
        turn: asyncio.Future[Ticket] = asyncio.get_running_loop().create_future()
        self._waiting.append((file_bytes, turn))
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave(turn.result())
            else:
                self._admit()  # it may have been the first in the queue
            raise

    def leave(self, ticket: Ticket) -> None:
        """A load has ended, or will never begin."""
        ticket.give_back()
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            file_bytes, turn = self._waiting[0]
            if turn.done():  # nobody waits for it any more
                self._waiting.popleft()
                continue
            ticket = self._memory.take(file_bytes)
            if ticket is None:
                return
            self._waiting.popleft()
            turn.set_result(ticket)
