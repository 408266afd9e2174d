"""The client for ordinary code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc

from polygraft_client import _calls
from polygraft_client._adapters import Adapters
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
from polygraft_client._streams import Stream
from polygraft_client._transport import Transport


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
        retries: further tries that gRPC makes, after short waits, while the server is unavailable;
            from 0 to 4. Calls that change the registry are never repeated.
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

    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Generation:
        """Generate a whole answer.

        Args:
            prompt: text, tokenized as it is; or give `token_ids` or `chat` instead.
            **options: see `GenerateOptions`.

        Raises:
            InvalidArgument: a value is out of range, or the prompt doesn't fit; see `violations`.
            NotFound: no such adapter.
            FailedPrecondition: the adapter is loading, failed or unloading.
            ResourceExhausted: the queue is full; see `retry_after`.
            Unavailable: the server is shutting down.
        """
        timeout, fields = split_timeout(options)
        return self._transport.run(_calls.generate(prompt, fields), timeout)

    def stream(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Stream:
        """Generate an answer chunk by chunk; arguments and errors as `generate`.

        The request starts at once; its errors are raised by iterating.
        """
        timeout, fields = split_timeout(options)
        return Stream(self._transport.open(_calls.stream(prompt, fields), timeout), self.address)

    def score(
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
        """Log-likelihoods of continuations of a prompt, as lm-evaluation-harness defines them.

        Args:
            prompt: text, which may be empty; None where `token_ids` or `chat` is given instead.
            continuations: texts or token ids, at most 256; each is scored by itself.
            top_logprobs: so many of the likeliest tokens at each position, in [0, 20].

        Raises:
            InvalidArgument: a value is out of range, or a continuation doesn't fit; see `violations`.
            NotFound, FailedPrecondition, ResourceExhausted, Unavailable: as `generate`.
        """
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
        return self._transport.run(call, timeout)

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        chat: Chat | None = None,
        adapter: str | None = None,
        adapters: AdapterRefs = (),
        timeout: float | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a text or of a conversation, as `generate` would use them for the adapter."""
        return self._transport.run(_calls.tokenize(prompt, chat, adapter, adapters), timeout)

    def detokenize(
        self,
        token_ids: Iterable[int],
        *,
        adapter: str | None = None,
        adapters: AdapterRefs = (),
        timeout: float | None = None,
    ) -> str:
        """Text of token ids, without special tokens."""
        return self._transport.run(_calls.detokenize(token_ids, adapter, adapters), timeout)

    def model(
        self,
        *,
        adapter: str | None = None,
        adapters: AdapterRefs = (),
        timeout: float | None = None,
    ) -> Model:
        """The model being served, its limits and its defaults. Its vocabulary size, end tokens and whether it
        has a chat template are those of requests with these adapters."""
        return self._transport.run(_calls.model(adapter, adapters), timeout)

    def health(self, service: str = "", *, timeout: float | None = None) -> Health:
        """The health of the server, or of one service such as "polygraft.v1.InferenceService".

        Raises:
            NotFound: the server has no such service.
        """
        return self._transport.run(_calls.health(service), timeout)

    def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
