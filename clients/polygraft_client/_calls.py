"""Every call of the contract, described once for both clients.

Each function takes a method's arguments and returns the `Call` to make. Its parameters and its docstring
are those of the method, of `Client` and of `AsyncClient` alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, Unpack

from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from polygraft_api.v1 import adapters_pb2, inference_pb2
from polygraft_client import _responses
from polygraft_client._models import Adapter, Chunk, Generation, Health, Model, Score
from polygraft_client._requests import (
    AdapterRefs,
    Chat,
    CombinationName,
    Continuations,
    GenerateOptions,
    LoraPathName,
    adapter_refs,
    enum_name,
    fill,
    generate_request,
    one_input,
    split_timeout,
    texts_or_ids,
)
from polygraft_types.requests import CombinationType, LoraPath

_INFERENCE = "/polygraft.v1.InferenceService/"
_ADAPTERS = "/polygraft.v1.AdapterService/"

_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class Call(Generic[_R]):
    """One call to make.

    Args:
        method: full path of the gRPC method.
        response_type: the message to parse each response as.
        convert: from that message to a model.
        timeout: seconds; None is the client's own.
    """

    method: str
    request: Message
    response_type: type[Message]
    convert: Callable[[Any], _R]
    timeout: float | None

    def parse(self, data: bytes) -> _R:
        """The result of a response as it is received."""
        return self.convert(self.response_type.FromString(data))


def generate(prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Call[Generation]:
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
    request = generate_request(prompt, **fields)
    return Call(
        f"{_INFERENCE}Generate", request, inference_pb2.GenerateResponse, _responses.generation_from, timeout
    )


def stream(prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Call[Chunk]:
    """Generate an answer chunk by chunk."""
    timeout, fields = split_timeout(options)
    request = generate_request(prompt, **fields)
    return Call(
        f"{_INFERENCE}GenerateStream",
        request,
        inference_pb2.GenerateStreamResponse,
        _responses.chunk_from,
        timeout,
    )


def score(
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
) -> Call[Score]:
    """Log-likelihoods of continuations of a prompt, as lm-evaluation-harness defines them.

    Args:
        prompt: text, which may be empty; None where `token_ids` or `chat` is given instead.
        continuations: texts or token ids, at most 256; each is scored by itself.
        top_logprobs: how many of the most likely tokens to return at each position, in [0, 20].

    Raises:
        InvalidArgument: a value is out of range, or a continuation doesn't fit; see `violations`.
        NotFound, FailedPrecondition, ResourceExhausted, Unavailable: as `generate`.
    """
    request = fill(
        inference_pb2.ScoreRequest,
        **one_input(prompt=prompt, token_ids=token_ids, chat=chat),
        **texts_or_ids(continuations),
        adapter=adapter,
        adapters=adapter_refs(adapters),
        combination_type=enum_name("combination_type", combination_type, CombinationName),
        lora_path=enum_name("lora_path", lora_path, LoraPathName),
        top_logprobs=top_logprobs,
    )
    return Call(f"{_INFERENCE}Score", request, inference_pb2.ScoreResponse, _responses.score_from, timeout)


def tokenize(
    prompt: str | None = None,
    *,
    chat: Chat | None = None,
    adapter: str | None = None,
    adapters: AdapterRefs = (),
    timeout: float | None = None,
) -> Call[tuple[int, ...]]:
    """Token ids of a text or of a conversation, as `generate` would use them for the adapter."""
    request = fill(
        inference_pb2.TokenizeRequest,
        **one_input(prompt=prompt, chat=chat),
        adapter=adapter,
        adapters=adapter_refs(adapters),
    )
    return Call(
        f"{_INFERENCE}Tokenize", request, inference_pb2.TokenizeResponse, _responses.token_ids_from, timeout
    )


def detokenize(
    token_ids: Iterable[int],
    *,
    adapter: str | None = None,
    adapters: AdapterRefs = (),
    timeout: float | None = None,
) -> Call[str]:
    """Text of token ids, without special tokens."""
    request = fill(
        inference_pb2.DetokenizeRequest,
        token_ids=list(token_ids),
        adapter=adapter,
        adapters=adapter_refs(adapters),
    )
    return Call(
        f"{_INFERENCE}Detokenize", request, inference_pb2.DetokenizeResponse, _responses.text_from, timeout
    )


def model(
    *, adapter: str | None = None, adapters: AdapterRefs = (), timeout: float | None = None
) -> Call[Model]:
    """The model being served, its limits and its defaults.

    The vocabulary size, the end-of-sequence tokens and `has_chat_template` are those of requests with these
    adapters.
    """
    request = fill(inference_pb2.GetModelRequest, adapter=adapter, adapters=adapter_refs(adapters))
    return Call(
        f"{_INFERENCE}GetModel", request, inference_pb2.GetModelResponse, _responses.model_from, timeout
    )


def health(service: str = "", *, timeout: float | None = None) -> Call[Health]:
    """The health of the server, or of one service such as "polygraft.v1.InferenceService".

    Raises:
        NotFound: the server has no such service.
    """
    # Wire-compatible with grpc.health.v1 (each has one field, number 1); registering that package's
    # own messages would need grpcio-health-checking here, or clash with it in a process that has it.
    request = StringValue(value=service)
    return Call("/grpc.health.v1.Health/Check", request, Int32Value, _responses.health_from, timeout)


def load(name: str, source: str = "", *, timeout: float | None = None) -> Call[Adapter]:
    """Load a folder of the server's store; loading what is already loaded changes nothing.

    Args:
        name: what requests will call it.
        source: the folder, relative to the store; "" is `name`.
        timeout: seconds; None is the client's own.

    Raises:
        InvalidArgument: the folder can't be served; `violations` lists every problem.
        AlreadyExists: the name is taken by other content.
        ResourceExhausted: no memory or no slot is left.
    """
    request = adapters_pb2.LoadAdapterRequest(name=name, source=source)
    return _adapter_call("LoadAdapter", request, adapters_pb2.LoadAdapterResponse, timeout)


def unload(name: str, *, wait: bool = True, timeout: float | None = None) -> Call[Adapter]:
    """Unload an adapter and return it as it last was.

    Args:
        wait: return when running requests have finished; otherwise refuse if there are any.
        timeout: seconds; None is the client's own.

    Raises:
        NotFound: no such adapter.
        FailedPrecondition: running requests use it, and `wait` is False.
    """
    mode = adapters_pb2.UNLOAD_MODE_WAIT if wait else adapters_pb2.UNLOAD_MODE_REFUSE
    request = adapters_pb2.UnloadAdapterRequest(name=name, mode=mode)
    return _adapter_call("UnloadAdapter", request, adapters_pb2.UnloadAdapterResponse, timeout)


def reload(name: str, *, timeout: float | None = None) -> Call[Adapter]:
    """Load an adapter's folder again under a new generation; running requests finish on the old one.

    The generation stays if the folder hasn't changed.

    Raises:
        NotFound: no such adapter.
        InvalidArgument, ResourceExhausted: as `load`.
    """
    request = adapters_pb2.ReloadAdapterRequest(name=name)
    return _adapter_call("ReloadAdapter", request, adapters_pb2.ReloadAdapterResponse, timeout)


def update(name: str, *, merged: bool, timeout: float | None = None) -> Call[Adapter]:
    """Pin a merged copy of the base for an adapter, or unpin it, so that it goes when memory is needed.

    Returns when the copy is there.

    Raises:
        NotFound: no such adapter.
        FailedPrecondition: its weights don't fold into the base's, or the copy exceeds the server's budget.
        ResourceExhausted: other pinned copies leave no room.
    """
    request = fill(adapters_pb2.UpdateAdapterRequest, name=name, merged=merged)
    return _adapter_call("UpdateAdapter", request, adapters_pb2.UpdateAdapterResponse, timeout)


def get(name: str, *, nearest_tokens: int = 0, timeout: float | None = None) -> Call[Adapter]:
    """Show one adapter.

    Args:
        nearest_tokens: for a soft prompt, how many of the vocabulary's nearest tokens to show for
            each virtual token; from 0 to 16.
        timeout: seconds; None is the client's own.

    Raises:
        NotFound: no such adapter.
    """
    request = fill(adapters_pb2.GetAdapterRequest, name=name, nearest_tokens=nearest_tokens)
    convert = _responses.adapter_with_nearest_tokens
    return Call(f"{_ADAPTERS}GetAdapter", request, adapters_pb2.GetAdapterResponse, convert, timeout)


def list_page(page_size: int, page_token: str, timeout: float | None) -> Call[_responses.AdapterPage]:
    """One page of the registry."""
    request = fill(adapters_pb2.ListAdaptersRequest, page_size=page_size, page_token=page_token)
    return Call(
        f"{_ADAPTERS}ListAdapters", request, adapters_pb2.ListAdaptersResponse, _responses.page_from, timeout
    )


def _adapter_call(
    method: str, request: Message, response_type: type[Message], timeout: float | None
) -> Call[Adapter]:
    return Call(f"{_ADAPTERS}{method}", request, response_type, _responses.adapter_in, timeout)
