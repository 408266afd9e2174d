"""Health and reflection: the libraries' own services, with their messages checked first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from polygraft.errors import InvalidRequest
from polygraft.rpc.limits import MessageLimits

Context = grpc.aio.ServicerContext[Any, Any]


def bounded(handler: Any, method: str, limits: MessageLimits) -> Any:
    """The handler, with its messages checked before they are parsed: one that is too large or malformed is
    INVALID_ARGUMENT."""
    serializer = handler.response_serializer

    async def parse(data: bytes, context: Context) -> Any:
        try:
            limits.check(method, len(data))
            return handler.request_deserializer(data)
        except (InvalidRequest, DecodeError) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the message can't be read: {error}")

    if handler.request_streaming:

        async def stream_stream(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
            async def parsed() -> AsyncIterator[Any]:
                async for data in requests:
                    yield await parse(data, context)

            async for response in handler.stream_stream(parsed(), context):
                yield response

        return grpc.stream_stream_rpc_method_handler(stream_stream, None, serializer)
    if handler.response_streaming:

        async def unary_stream(data: bytes, context: Context) -> None:
            # Health holds a lock while it writes to a watcher. One that doesn't read would block all others,
            # and the server couldn't announce its shutdown.
            latest = _Latest()
            watching = asyncio.ensure_future(handler.unary_stream(await parse(data, context), latest))
            watching.add_done_callback(lambda _: latest.end())
            try:
                async for message in latest:
                    await context.write(message)
                await watching
            finally:
                watching.cancel()

        return grpc.unary_stream_rpc_method_handler(unary_stream, None, serializer)

    async def unary_unary(data: bytes, context: Context) -> Any:
        return await handler.unary_unary(await parse(data, context), context)

    return grpc.unary_unary_rpc_method_handler(unary_unary, None, serializer)


class _Latest:
    """Stands in for a call's context: accepts messages at once, and yields only the latest."""

    def __init__(self) -> None:
        self._message: Any = None
        self._ended = False
        self._news = asyncio.Event()

    async def write(self, message: Any) -> None:
        """Accept a message, replacing one that hasn't been sent."""
        self._message = message
        self._news.set()

    def end(self) -> None:
        """No more messages will come."""
        self._ended = True
        self._news.set()

    async def __aiter__(self) -> AsyncIterator[Any]:
        while not self._ended:
            await self._news.wait()
            self._news.clear()
            if self._message is not None:
                message, self._message = self._message, None
                yield message
