"""The registry, as `client.adapters` of both clients."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from polygraft_client import _calls
from polygraft_client._methods import awaitable, blocking
from polygraft_client._models import Adapter
from polygraft_client._transport import AsyncTransport, Transport


class Adapters:
    """Loads, unloads and shows adapters. All methods raise Unauthenticated where a token is missing."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    load = blocking(_calls.load)
    unload = blocking(_calls.unload)
    reload = blocking(_calls.reload)
    update = blocking(_calls.update)
    get = blocking(_calls.get)

    def list(self, *, page_size: int = 0, timeout: float | None = None) -> Iterator[Adapter]:
        """All adapters by name, those that failed to load included; pages are fetched as needed.

        Args:
            page_size: most adapters in one page, at most 1000; 0 is the server's choice.
            timeout: seconds for each page; None is the client's own.
        """
        token = ""
        while True:
            page = self._transport.run(_calls.list_page(page_size, token, timeout))
            yield from page.adapters
            if not (token := page.next_page_token):
                return


class AsyncAdapters:
    """Loads, unloads and shows adapters; see `Adapters` for arguments and errors."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    load = awaitable(_calls.load)
    unload = awaitable(_calls.unload)
    reload = awaitable(_calls.reload)
    update = awaitable(_calls.update)
    get = awaitable(_calls.get)

    async def list(self, *, page_size: int = 0, timeout: float | None = None) -> AsyncIterator[Adapter]:
        """All adapters by name; pages are fetched as needed."""
        token = ""
        while True:
            page = await self._transport.run(_calls.list_page(page_size, token, timeout))
            for adapter in page.adapters:
                yield adapter
            if not (token := page.next_page_token):
                return
