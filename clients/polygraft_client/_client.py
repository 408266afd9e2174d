"""The two clients: `Client` blocks, `AsyncClient` is awaited."""

from __future__ import annotations

from types import TracebackType
from typing import Self, Unpack

import grpc

from polygraft_client import _calls
from polygraft_client._adapters import Adapters, AsyncAdapters
from polygraft_client._endpoint import Endpoint
from polygraft_client._methods import awaitable, blocking
from polygraft_client._requests import GenerateOptions
from polygraft_client._streams import AsyncStream, Stream
from polygraft_client._transport import AsyncTransport, Transport


class Client:
    """Talks to one server; may be shared between threads.

    Every method raises ConnectError if the server can't be reached, DeadlineExceeded after `timeout`
    seconds, InvalidRequest for arguments that can't be sent, UsageError once it is closed, and StatusError
    for any other answer.

    Args:
        address: HOST:PORT of the gRPC server.
        token: for servers that ask for one; without `credentials` it travels in plain text. White space
            around it, such as a line break at a file's end, is stripped.
        timeout: seconds for each call that doesn't give its own; None waits as long as it takes.
        credentials: for TLS, such as `grpc.ssl_channel_credentials()`; None is plain text.
        retries: how often gRPC tries again, after short waits, while the server is unavailable; from 0
            to 4. Calls that change the registry are never repeated.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        *,
        token: str | None = None,
        timeout: float | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        retries: int = 2,
    ) -> None:
        self._transport = Transport(Endpoint(address, token, timeout, credentials, retries))
        self.adapters = Adapters(self._transport)

    @property
    def address(self) -> str:
        """HOST:PORT of the server."""
        return self._transport.endpoint.address

    generate = blocking(_calls.generate)
    score = blocking(_calls.score)
    tokenize = blocking(_calls.tokenize)
    detokenize = blocking(_calls.detokenize)
    model = blocking(_calls.model)
    health = blocking(_calls.health)

    def stream(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Stream:
        """Generate an answer chunk by chunk; arguments and errors as `generate`.

        The request starts at once; its errors are raised by iterating.
        """
        return Stream(self._transport.open(_calls.stream(prompt, **options)), self.address)

    def close(self) -> None:
        """Close the connection and cancel the calls under way."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """Talks to one server from one event loop, that of its first call; see `Client` for arguments and errors.

    On any other loop, or outside of one, its methods raise UsageError. Each `asyncio.run` makes a new loop.

    Cancelling a task that waits for a call cancels the call, and the server frees what it holds.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        *,
        token: str | None = None,
        timeout: float | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        retries: int = 2,
    ) -> None:
        self._transport = AsyncTransport(Endpoint(address, token, timeout, credentials, retries))
        self.adapters = AsyncAdapters(self._transport)

    @property
    def address(self) -> str:
        """HOST:PORT of the server."""
        return self._transport.endpoint.address

    generate = awaitable(_calls.generate)
    score = awaitable(_calls.score)
    tokenize = awaitable(_calls.tokenize)
    detokenize = awaitable(_calls.detokenize)
    model = awaitable(_calls.model)
    health = awaitable(_calls.health)

    def stream(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """Generate an answer chunk by chunk; arguments and errors as `generate`.

        The request starts at once, so a loop must be running; its errors are raised by iterating.
        """
        return AsyncStream(self._transport.open(_calls.stream(prompt, **options)), self.address)

    async def close(self) -> None:
        """Close the connection and cancel the calls under way."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
