"""Health and reflection: the libraries' own services, behind a check of their messages."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from polygraft.errors import InvalidRequest
from polygraft.rpc.limits import MessageLimits

Context = grpc.aio.ServicerContext[Any, Any]


def bounded(handler: Any, method: str, limits: MessageLimits) -> Any:
    """The handler, behind a check of its messages before they are parsed: one that is too large or broken is
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
            await handler.unary_stream(await parse(data, context), context)

        return grpc.unary_stream_rpc_method_handler(unary_stream, None, serializer)

    async def unary_unary(data: bytes, context: Context) -> Any:
        return await handler.unary_unary(await parse(data, context), context)

    return grpc.unary_unary_rpc_method_handler(unary_unary, None, serializer)
