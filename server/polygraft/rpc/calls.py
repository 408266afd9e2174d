"""The calls in flight: their ids, and the gate that shuts while the server drains."""

from __future__ import annotations

import asyncio
import re
import secrets

from polygraft.errors import PolygraftError

_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}")


class Calls:
    """Knows every call in flight. `refusal` is what new ones get instead of being let in.

    Args:
        most: calls in flight over all connections; None is any number.
    """

    def __init__(self, most: int | None = None) -> None:
        self.refusal: PolygraftError | None = None
        self.most = most
        self._ids: set[str] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._ids)

    def enter(self, wanted: str | None) -> str:
        """Register a call and return its id: the wanted one if it is sane, made unique if it is taken."""
        if wanted is None or not _SANE_ID.fullmatch(wanted):
            name = secrets.token_hex(8)
        elif wanted in self._ids:
            name = f"{wanted}-{secrets.token_hex(4)}"
        else:
            name = wanted
        self._ids.add(name)
        self._idle.clear()
        return name

    def leave(self, name: str) -> None:
        """Take a call off the list."""
        self._ids.remove(name)
        if not self._ids:
            self._idle.set()

    async def wait_idle(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds until no call is in flight; returns whether that is so."""
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
