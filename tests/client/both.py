"""Uses either client in the same way, for tests that hold for both."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from polygraft_client import AsyncStream


async def done(result: Any) -> Any:
    """The result of a `Client`'s method, or of an `AsyncClient`'s, which is awaited."""
    return await result if inspect.isawaitable(result) else result


@asynccontextmanager
async def entered(thing: Any) -> AsyncIterator[Any]:
    """A client or a stream in its `with` or `async with` block."""
    if isinstance(thing, AbstractAsyncContextManager):
        async with thing as inside:
            yield inside
    else:
        with thing as inside:
            yield inside


async def next_chunk(stream: Any) -> Any:
    """A stream's next chunk."""
    return await anext(stream) if isinstance(stream, AsyncStream) else next(stream)


async def all_of(items: Any) -> list[Any]:
    """The rest of a stream, or of a listing."""
    return [item async for item in items] if isinstance(items, AsyncIterator) else list(items)
