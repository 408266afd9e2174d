"""Sends calls through a gRPC channel and converts its errors."""

from __future__ import annotations

import asyncio
from functools import cached_property
from typing import Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from polygraft_client._calls import Call
from polygraft_client._endpoint import Endpoint
from polygraft_client._exceptions import UsageError
from polygraft_client._status import error_from_cancellation, error_from_rpc

_R = TypeVar("_R")
_R_co = TypeVar("_R_co", covariant=True)

CLOSED = "the client is closed: make another one"


class ResponseIterator(Protocol[_R_co]):
    """The responses of a streaming call, which can be cancelled."""

    def __next__(self) -> _R_co:
        """The next response; raises grpc.RpcError."""

    def cancel(self) -> bool:
        """Cancel the call; does nothing if it has ended."""


class Transport:
    """Sends calls and blocks until they are answered."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._closed = False

    def run(self, call: Call[_R]) -> _R:
        """Make one call; raises PolygraftError."""
        deadline = self.endpoint.deadline(call.timeout)
        method = self._open_channel().unary_unary(call.method, _serialize, call.parse)
        try:
            return method(call.request, timeout=deadline, metadata=self.endpoint.metadata)
        except grpc.RpcError as error:
            raise error_from_rpc(error, self.endpoint.address) from error
        except ValueError as error:
            # grpc raises this if another thread closed the channel between the check and the call.
            self._open_channel()
            raise error

    def open(self, call: Call[_R]) -> ResponseIterator[_R]:
        """Start a streaming call; raises UsageError, InvalidRequest."""
        deadline = self.endpoint.deadline(call.timeout)
        method = self._open_channel().unary_stream(call.method, _serialize, call.parse)
        return method(call.request, timeout=deadline, metadata=self.endpoint.metadata)

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self._closed = True
        self._channel.close()

    def _open_channel(self) -> grpc.Channel:
        if self._closed:
            raise UsageError(CLOSED)
        return self._channel

    @cached_property
    def _channel(self) -> grpc.Channel:
        address, options = self.endpoint.address, self.endpoint.options
        if self.endpoint.credentials is not None:
            return grpc.secure_channel(address, self.endpoint.credentials, options)
        return grpc.insecure_channel(address, options)


class AsyncTransport:
    """Sends calls from one event loop, that of the first call."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channel: grpc.aio.Channel | None = None
        self._closed = False

    async def run(self, call: Call[_R]) -> _R:
        """Make one call; raises PolygraftError."""
        deadline = self.endpoint.deadline(call.timeout)
        method = self._open_channel().unary_unary(call.method, _serialize, call.parse)
        try:
            return await method(call.request, timeout=deadline, metadata=self.endpoint.metadata)
        except grpc.RpcError as error:
            raise error_from_rpc(error, self.endpoint.address) from error
        except asyncio.CancelledError as error:
            raise error_from_cancellation(error, self.endpoint.address) from error

    def open(self, call: Call[_R]) -> grpc.aio.UnaryStreamCall[Message, _R]:
        """Start a streaming call; raises UsageError, InvalidRequest."""
        deadline = self.endpoint.deadline(call.timeout)
        method = self._open_channel().unary_stream(call.method, _serialize, call.parse)
        return method(call.request, timeout=deadline, metadata=self.endpoint.metadata)

    async def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self._closed = True
        if self._channel is not None and self._loop is asyncio.get_running_loop():
            await self._channel.close()
        # Otherwise there is nothing to wait for: the calls have ended with their loop.
        self._channel = None

    def _open_channel(self) -> grpc.aio.Channel:
        """The channel, created at the first call, since it belongs to the event loop that creates it."""
        loop = running_loop()
        if self._closed:
            raise UsageError(CLOSED)
        if self._channel is not None:
            check_loop(self._loop, loop)
            return self._channel
        self._loop = loop
        address, options = self.endpoint.address, self.endpoint.options
        if self.endpoint.credentials is not None:
            self._channel = grpc.aio.secure_channel(address, self.endpoint.credentials, options)
        else:
            self._channel = grpc.aio.insecure_channel(address, options)
        return self._channel


def running_loop() -> asyncio.AbstractEventLoop:
    """The running event loop; raises UsageError if there is none."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise UsageError(
            "AsyncClient needs a running event loop: call it inside a coroutine, or use Client"
        ) from None


def check_loop(own: asyncio.AbstractEventLoop | None, running: asyncio.AbstractEventLoop) -> None:
    """Raise UsageError unless a client or a stream is used on its own event loop."""
    if own is not running:
        raise UsageError(
            "this AsyncClient belongs to another event loop, the one of its first call: make a client for "
            "each loop, inside asyncio.run, or use Client"
        )


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
