"""The contract's methods, each as a request, where it goes and what becomes of the response.

Both clients send these; neither knows a request's or a response's fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from polygraft_api.v1 import adapters_pb2, inference_pb2
from polygraft_client import _requests, _responses
from polygraft_client._models import Adapter, Chunk, Generation, Health, Model, Score
from polygraft_client._requests import Adapters, Chat, Continuations

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
    """

    method: str
    request: Message
    response_type: type[Message]
    convert: Callable[[Any], _R]

    def parse(self, data: bytes) -> _R:
        """Read a response off the wire."""
        return self.convert(self.response_type.FromString(data))


def generate(prompt: str | None, options: dict[str, Any]) -> Call[Generation]:
    """A whole answer."""
    request = _requests.generate_request(prompt, **options)
    return Call(f"{_INFERENCE}Generate", request, inference_pb2.GenerateResponse, _responses.generation_from)


def stream(prompt: str | None, options: dict[str, Any]) -> Call[Chunk]:
    """An answer in chunks."""
    request = _requests.generate_request(prompt, **options)
    return Call(
        f"{_INFERENCE}GenerateStream", request, inference_pb2.GenerateStreamResponse, _responses.chunk_from
    )


def score(prompt: str | None, continuations: Continuations, **options: Any) -> Call[Score]:
    """Log-likelihoods of continuations."""
    request = _requests.score_request(prompt, continuations, **options)
    return Call(f"{_INFERENCE}Score", request, inference_pb2.ScoreResponse, _responses.score_from)


def tokenize(
    prompt: str | None, chat: Chat | None, adapter: str | None, adapters: Adapters
) -> Call[tuple[int, ...]]:
    """Text or a conversation to token ids."""
    request = _requests.tokenize_request(prompt, chat=chat, adapter=adapter, adapters=adapters)
    return Call(f"{_INFERENCE}Tokenize", request, inference_pb2.TokenizeResponse, _responses.token_ids_from)


def detokenize(token_ids: Iterable[int], adapter: str | None, adapters: Adapters) -> Call[str]:
    """Token ids to text."""
    request = _requests.detokenize_request(token_ids, adapter=adapter, adapters=adapters)
    return Call(f"{_INFERENCE}Detokenize", request, inference_pb2.DetokenizeResponse, _responses.text_from)


def model(adapter: str | None, adapters: Adapters) -> Call[Model]:
    """The model as it is served."""
    request = _requests.model_request(adapter=adapter, adapters=adapters)
    return Call(f"{_INFERENCE}GetModel", request, inference_pb2.GetModelResponse, _responses.model_from)


def load_adapter(name: str, source: str) -> Call[Adapter]:
    """Load a folder of the store."""
    request = adapters_pb2.LoadAdapterRequest(name=name, source=source)
    return Call(f"{_ADAPTERS}LoadAdapter", request, adapters_pb2.LoadAdapterResponse, _adapter_in)


def unload_adapter(name: str, *, wait: bool) -> Call[Adapter]:
    """Unload an adapter."""
    request = _requests.unload_request(name, wait=wait)
    return Call(f"{_ADAPTERS}UnloadAdapter", request, adapters_pb2.UnloadAdapterResponse, _adapter_in)


def reload_adapter(name: str) -> Call[Adapter]:
    """Load an adapter's folder again."""
    request = adapters_pb2.ReloadAdapterRequest(name=name)
    return Call(f"{_ADAPTERS}ReloadAdapter", request, adapters_pb2.ReloadAdapterResponse, _adapter_in)


def update_adapter(name: str, *, merged: bool) -> Call[Adapter]:
    """Keep a merged copy for an adapter, or keep it no longer."""
    request = _requests.update_adapter_request(name, merged=merged)
    return Call(f"{_ADAPTERS}UpdateAdapter", request, adapters_pb2.UpdateAdapterResponse, _adapter_in)


def get_adapter(name: str, *, nearest_tokens: int) -> Call[Adapter]:
    """One adapter in detail."""
    request = _requests.get_adapter_request(name, nearest_tokens=nearest_tokens)
    return Call(
        f"{_ADAPTERS}GetAdapter", request, adapters_pb2.GetAdapterResponse, _responses.adapter_detail_from
    )


def list_adapters(page_size: int, page_token: str = "") -> Call[AdapterPage]:
    """A page of the registry."""
    request = _requests.list_adapters_request(page_size, page_token)
    return Call(f"{_ADAPTERS}ListAdapters", request, adapters_pb2.ListAdaptersResponse, AdapterPage.parse)


def health(service: str) -> Call[Health]:
    """The health of the server ("") or of one of its services."""
    # Wire-compatible with grpc.health.v1 (each has one field, number 1); registering that package's
    # own messages would need grpcio-health-checking here, or clash with it in a process that has it.
    return Call("/grpc.health.v1.Health/Check", StringValue(value=service), Int32Value, _health_from)


@dataclass(frozen=True, slots=True)
class AdapterPage:
    """Some adapters, and where the next ones are; "" after the last."""

    adapters: tuple[Adapter, ...]
    next_page_token: str

    @classmethod
    def parse(cls, response: adapters_pb2.ListAdaptersResponse) -> AdapterPage:
        """Convert a page."""
        return cls(tuple(map(_responses.adapter_from, response.adapters)), response.next_page_token)


def _adapter_in(response: Any) -> Adapter:
    return _responses.adapter_from(response.adapter)


def _health_from(response: Int32Value) -> Health:
    members = list(Health)  # in the order of the standard's numbers
    return members[response.value] if 0 <= response.value < len(members) else Health.UNKNOWN
