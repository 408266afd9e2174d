"""The registry, as `client.adapters`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from polygraft_client import _calls
from polygraft_client._models import Adapter
from polygraft_client._transport import AsyncTransport, Transport


class Adapters:
    """Loads, unloads and shows adapters. All methods raise Unauthenticated where a token is missing."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def load(self, name: str, source: str = "", *, timeout: float | None = None) -> Adapter:
        """Load a folder of the server's store; loading what is already loaded changes nothing.

        Args:
            name: what requests will call it.
            source: the folder, relative to the store; "" is `name`.
            timeout: seconds; None is the client's own.

        Raises:
            InvalidArgument: the folder can't be served; every problem is one of `violations`.
            AlreadyExists: the name is taken by other content.
            ResourceExhausted: no memory or no slot is left.
        """
        return self._transport.run(_calls.load_adapter(name, source), timeout)

    def unload(self, name: str, *, wait: bool = True, timeout: float | None = None) -> Adapter:
        """Unload an adapter and return it as it last was.

        Args:
            wait: return when running requests have finished; otherwise refuse if there are any.
            timeout: seconds; None is the client's own.

        Raises:
            NotFound: no such adapter.
            FailedPrecondition: running requests use it, and `wait` is False.
        """
        return self._transport.run(_calls.unload_adapter(name, wait=wait), timeout)

    def reload(self, name: str, *, timeout: float | None = None) -> Adapter:
        """Load an adapter's folder again under a new generation; running requests finish on the old one.

        The generation stays if the folder hasn't changed.

        Raises:
            NotFound: no such adapter.
            InvalidArgument, ResourceExhausted: as `load`.
        """
        return self._transport.run(_calls.reload_adapter(name), timeout)

    def update(self, name: str, *, merged: bool, timeout: float | None = None) -> Adapter:
        """Keep a merged copy of the base for an adapter, or let it go when its memory is needed.

        Returns when the copy is there.

        Raises:
            NotFound: no such adapter.
            FailedPrecondition: its weights don't fold into the base's, or not into the server's budget.
            ResourceExhausted: other pinned copies leave no room.
        """
        return self._transport.run(_calls.update_adapter(name, merged=merged), timeout)

    def get(self, name: str, *, nearest_tokens: int = 0, timeout: float | None = None) -> Adapter:
        """Show one adapter.

        Args:
            nearest_tokens: for a soft prompt, how many of the vocabulary's nearest tokens to show for
                each virtual token; from 0 to 16.
            timeout: seconds; None is the client's own.

        Raises:
            NotFound: no such adapter.
        """
        return self._transport.run(_calls.get_adapter(name, nearest_tokens=nearest_tokens), timeout)

    def list(self, *, page_size: int = 0, timeout: float | None = None) -> Iterator[Adapter]:
        """All adapters by name, those that failed to load included; pages are fetched as needed.

        Args:
            page_size: most adapters in one page, at most 1000; 0 is the server's choice.
            timeout: seconds for each page; None is the client's own.
        """
        token = ""
        while True:
            page = self._transport.run(_calls.list_adapters(page_size, token), timeout)
            yield from page.adapters
            if not (token := page.next_page_token):
                return


class AsyncAdapters:
    """Loads, unloads and shows adapters; see `Adapters` for arguments and errors."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def load(self, name: str, source: str = "", *, timeout: float | None = None) -> Adapter:
        """Load a folder of the server's store; loading what is already loaded changes nothing."""
        return await self._transport.run(_calls.load_adapter(name, source), timeout)

    async def unload(self, name: str, *, wait: bool = True, timeout: float | None = None) -> Adapter:
        """Unload an adapter and return it as it last was."""
        return await self._transport.run(_calls.unload_adapter(name, wait=wait), timeout)

    async def reload(self, name: str, *, timeout: float | None = None) -> Adapter:
        """Load an adapter's folder again under a new generation."""
        return await self._transport.run(_calls.reload_adapter(name), timeout)

    async def update(self, name: str, *, merged: bool, timeout: float | None = None) -> Adapter:
        """Keep a merged copy of the base for an adapter, or let it go when its memory is needed."""
        return await self._transport.run(_calls.update_adapter(name, merged=merged), timeout)

    async def get(self, name: str, *, nearest_tokens: int = 0, timeout: float | None = None) -> Adapter:
        """Show one adapter."""
        return await self._transport.run(_calls.get_adapter(name, nearest_tokens=nearest_tokens), timeout)

    async def list(self, *, page_size: int = 0, timeout: float | None = None) -> AsyncIterator[Adapter]:
        """All adapters by name; pages are fetched as needed."""
        token = ""
        while True:
            page = await self._transport.run(_calls.list_adapters(page_size, token), timeout)
            for adapter in page.adapters:
                yield adapter
            if not (token := page.next_page_token):
                return
