"""An answer that arrives chunk by chunk."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Self

import grpc
from google.protobuf.message import Message

from polygraft_client._exceptions import Cancelled
from polygraft_client._models import Chunk, Generation
from polygraft_client._status import error_from_cancellation, error_from_rpc
from polygraft_client._transport import ResponseIterator, check_loop, running_loop


class _Progress:
    """State that both kinds of stream keep."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._generation: Generation | None = None
        self._closed = False

    @property
    def generation(self) -> Generation | None:
        """The whole answer, once the last chunk has arrived."""
        return self._generation

    def _received(self, chunk: Chunk) -> Chunk:
        self._generation = chunk.generation or self._generation
        return chunk

    def _whole(self) -> Generation:
        if self._generation is None:
            raise Cancelled(f"{self._address}: the stream was closed before its end")
        return self._generation


class Stream(_Progress):
    """The chunks of an answer: an iterator and a context manager.

    Closing it, leaving its `with` block or dropping it (as `break` does with
    `for chunk in client.stream(…)`) cancels the request, and the server frees what it holds. Iterating
    raises what `generate` raises, and Cancelled if another thread closes the stream.
    """

    def __init__(self, call: ResponseIterator[Chunk], address: str) -> None:
        super().__init__(address)
        self._call = call

    def until_done(self) -> Generation:
        """Read the remaining chunks and return the whole answer; raises what iterating raises."""
        for _ in self:
            pass
        return self._whole()

    def close(self) -> None:
        """Cancel the request if it still runs; iterating then ends."""
        self._closed = True
        self._call.cancel()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        if self._closed:
            raise StopIteration
        try:
            return self._received(next(self._call))
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._address) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class AsyncStream(_Progress):
    """The chunks of an answer: an async iterator and an async context manager.

    Closing it, leaving its `async with` block or dropping it (as `break` does with
    `async for chunk in client.stream(…)`) cancels the request, and the server frees what it holds.
    Iterating raises what `generate` raises.
    """

    def __init__(self, call: grpc.aio.UnaryStreamCall[Message, Chunk], address: str) -> None:
        super().__init__(address)
        self._call = call
        self._chunks = call.__aiter__()
        self._loop = running_loop()

    async def until_done(self) -> Generation:
        """Read the remaining chunks and return the whole answer; raises what iterating raises."""
        async for _ in self:
            pass
        return self._whole()

    async def close(self) -> None:
        """Cancel the request if it still runs; iterating then ends."""
        self._closed = True
        self._call.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        if self._closed:
            raise StopAsyncIteration
        check_loop(self._loop, running_loop())
        try:
            return self._received(await self._chunks.__anext__())
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._address) from error
        except asyncio.CancelledError as error:
            raise error_from_cancellation(error, self._address) from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, which has ended the call
            self._call.cancel()
