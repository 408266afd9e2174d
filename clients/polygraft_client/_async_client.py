"""The client for asyncio."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc

from polygraft_client import _calls
from polygraft_client._adapters import AsyncAdapters
from polygraft_client._endpoint import Endpoint
from polygraft_client._models import CombinationType, Generation, Health, LoraPath, Model, Score
from polygraft_client._requests import Adapters as AdapterRefs
from polygraft_client._requests import (
    Chat,
    CombinationName,
    Continuations,
    GenerateOptions,
    LoraPathName,
    split_timeout,
)
from polygraft_client._streams import AsyncStream
from polygraft_client._transport import AsyncTransport


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

    async def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Generation:
        """Generate a whole answer; errors as `Client.generate`."""
        timeout, fields = split_timeout(options)
        return await self._transport.run(_calls.generate(prompt, fields), timeout)

    def stream(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """Generate an answer chunk by chunk; arguments and errors as `Client.generate`.

        The request starts at once, so a loop must be running; its errors are raised by iterating.
        """
        timeout, fields = split_timeout(options)
        return AsyncStream(self._transport.open(_calls.stream(prompt, fields), timeout), self.address)

    async def score(
        self,
        prompt: str | None,
        continuations: Continuations,
        *,
        token_ids: Sequence[int] | None = None,
        chat: Chat | None = None,
        adapter: str | None = None,
        adapters: AdapterRefs = (),
        combination_type: CombinationType | CombinationName | None = None,
        lora_path: LoraPath | LoraPathName | None = None,
        top_logprobs: int = 0,
        timeout: float | None = None,
    ) -> Score:
        """Log-likelihoods of continuations; arguments and errors as `Client.score`."""
        call = _calls.score(
            prompt,
            continuations,
            token_ids=token_ids,
            chat=chat,
            adapter=adapter,
            adapters=adapters,
            combination_type=combination_type,
            lora_path=lora_path,
            top_logprobs=top_logprobs,
        )
        return await self._transport.run(call, timeout)

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        chat: Chat | None = None,
        adapter: str | None = None,
        adapters: AdapterRefs = (),
        timeout: float | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a text or of a conversation, as `generate` would use them for the adapter."""
        return await self._transport.run(_calls.tokenize(prompt, chat, adapter, adapters), timeout)

    async def detokenize(
        self,
        token_ids: Iterable[int],
        *,
        adapter: str | None = None,
        adapters: AdapterRefs = (),
        timeout: float | None = None,
    ) -> str:
        """Text of token ids, without special tokens."""
        return await self._transport.run(_calls.detokenize(token_ids, adapter, adapters), timeout)

    async def model(
        self,
        *,
        adapter: str | None = None,
        adapters: AdapterRefs = (),
        timeout: float | None = None,
    ) -> Model:
        """The model being served, its limits and its defaults. Its vocabulary size, end tokens and whether it
        has a chat template are those of requests with these adapters."""
        return await self._transport.run(_calls.model(adapter, adapters), timeout)

    async def health(self, service: str = "", *, timeout: float | None = None) -> Health:
        """The health of the server, or of one service; errors as `Client.health`."""
        return await self._transport.run(_calls.health(service), timeout)

    async def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
