"""From arguments to the contract's requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar, get_args

from google.protobuf.message import Message

from polygraft_api.v1 import adapters_pb2, inference_pb2
from polygraft_client._exceptions import InvalidRequest
from polygraft_client._models import AdapterRef, ChatMessage, CombinationType, LoraPath

Chat = Sequence[ChatMessage | Mapping[str, str]]
"""A conversation: `ChatMessage`s, or dicts with the keys "role" and "content"."""
Adapters = Sequence[AdapterRef | str | tuple[str, float]]
"""Several adapters: `AdapterRef`s, names, or names with weights."""
Continuations = Sequence[str] | Sequence[Sequence[int]]
"""What to score: texts, or token ids."""

LoraPathName = Literal["auto", "unmerged", "merged"]
"""A `LoraPath` that may be asked for."""
CombinationName = Literal["stack", "linear"]
"""A `CombinationType`."""
_PATHS, _COMBINATIONS = get_args(LoraPathName), get_args(CombinationName)

_M = TypeVar("_M", bound=Message)


class GenerateOptions(TypedDict, total=False):
    """The keyword arguments of `generate` and `stream`; all are optional.

    What is left out is the server's business: the model's generation_config, then the default that
    the contract documents.
    """

    token_ids: Sequence[int]
    """The input as token ids, instead of `prompt`."""
    chat: Chat
    """The input as a conversation, instead of `prompt`; rendered through the model's chat template."""
    adapter: str | None
    """Name of the adapter; None is the base model."""
    adapters: Adapters
    """Several adapters instead, at most 8, in the order in which they act; or one with a weight."""
    combination_type: CombinationType | CombinationName
    """What they are together."""
    lora_path: LoraPath | LoraPathName
    """How LoRA runs: "unmerged" computes a side path, "merged" runs on a copy of the weights with the adapter
    folded in, "auto" leaves it to the server."""
    temperature: float | None
    """0 and anything below 1e-6 is greedy. Range [0, 100]."""
    top_p: float | None
    """Keep the smallest set of tokens whose probability reaches this. Range (0, 1]."""
    top_k: int | None
    """Keep the k likeliest tokens; 0 keeps all."""
    min_p: float | None
    """Drop tokens less likely than this share of the likeliest's probability. Range [0, 1]."""
    seed: int | None
    """All that the sampling noise depends on, beside the position. Range [0, 2^63)."""
    repetition_penalty: float | None
    """Makes tokens of the prompt and the answer so far less likely above 1. Range [1e-6, 100]."""
    presence_penalty: float | None
    """Subtracted from the logits of tokens in the answer so far. Range [-2, 2]."""
    frequency_penalty: float | None
    """The same, times how often the token is there. Range [-2, 2]."""
    logit_bias: Mapping[int, float]
    """Token ids to additions to their logits, in [-100, 100]. At most 1024."""
    max_new_tokens: int | None
    """Most tokens to generate."""
    min_new_tokens: int | None
    """No end-of-sequence token, stop token or stop sequence counts before this many tokens."""
    stop: str | Sequence[str]
    """The text ends before the first of these that appears. At most 16."""
    stop_token_ids: Sequence[int]
    """Token ids that end the request and aren't part of the text. At most 64."""
    ignore_eos: bool
    """Go on after the model's end-of-sequence tokens."""
    time_limit: float | None
    """Seconds after arrival, queueing included; the answer is then what there is so far."""
    return_token_ids: bool
    """Fill `token_ids` of the answer."""
    logprobs: bool
    """Fill `logprobs` of the answer."""
    top_logprobs: int
    """So many of the likeliest tokens at each position in `logprobs`. Range [0, 20]."""
    echo: bool
    """Let the answer begin with the prompt: its text, and its tokens where these are asked for."""
    timeout: float | None
    """Seconds until the call fails with DeadlineExceeded; None is the client's own."""


def _value(argument: str, given: str | None, prefix: str, known: Sequence[str]) -> str | None:
    """The contract's name of an enum's value; raises InvalidRequest."""
    if given is None:
        return None
    if not isinstance(given, str) or given.lower() not in known:
        raise InvalidRequest(argument, f"expected {' or '.join(map(repr, known))}, got {given!r}")
    return prefix + given.upper()


def split_timeout(options: GenerateOptions) -> tuple[float | None, dict[str, Any]]:
    """Part the one option that is the call's from those that are the request's."""
    fields: dict[str, Any] = {**options}
    return fields.pop("timeout", None), fields


def generate_request(
    prompt: str | None = None,
    *,
    token_ids: Sequence[int] | None = None,
    chat: Chat | None = None,
    adapter: str | None = None,
    adapters: Adapters = (),
    combination_type: CombinationType | CombinationName | None = None,
    lora_path: LoraPath | LoraPathName | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    max_new_tokens: int | None = None,
    min_new_tokens: int | None = None,
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    time_limit: float | None = None,
    return_token_ids: bool = False,
    logprobs: bool = False,
    top_logprobs: int = 0,
    echo: bool = False,
) -> inference_pb2.GenerateRequest:
    """Build the request of Generate and GenerateStream; raises InvalidRequest."""
    return _fill(
        inference_pb2.GenerateRequest,
        **_input(prompt=prompt, token_ids=token_ids, chat=chat),
        adapter=adapter,
        adapters=_adapters(adapters),
        combination_type=_value("combination_type", combination_type, "COMBINATION_TYPE_", _COMBINATIONS),
        lora_path=_value("lora_path", lora_path, "LORA_PATH_", _PATHS),
        sampling=_fill(
            inference_pb2.SamplingOptions,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=None if logit_bias is None else dict(logit_bias),
        ),
        stopping=_fill(
            inference_pb2.StoppingOptions,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            stop_sequences=[stop] if isinstance(stop, str) else list(stop),
            stop_token_ids=list(stop_token_ids),
            ignore_eos=ignore_eos,
            time_limit=time_limit,
        ),
        response=_fill(
            inference_pb2.ResponseOptions,
            token_ids=return_token_ids,
            logprobs=logprobs,
            top_logprobs=top_logprobs,
            echo=echo,
        ),
    )


def score_request(
    prompt: str | None,
    continuations: Continuations,
    *,
    token_ids: Sequence[int] | None = None,
    chat: Chat | None = None,
    adapter: str | None = None,
    adapters: Adapters = (),
    combination_type: CombinationType | CombinationName | None = None,
    lora_path: LoraPath | LoraPathName | None = None,
    top_logprobs: int = 0,
) -> inference_pb2.ScoreRequest:
    """Build the request of Score; raises InvalidRequest."""
    texts: list[Any] = [continuations] if isinstance(continuations, str) else list(continuations)
    as_text = all(isinstance(text, str) for text in texts)
    return _fill(
        inference_pb2.ScoreRequest,
        **_input(prompt=prompt, token_ids=token_ids, chat=chat),
        continuations=texts if as_text else None,
        continuation_token_ids=None if as_text else [_ids(at, ids) for at, ids in enumerate(texts)],
        adapter=adapter,
        adapters=_adapters(adapters),
        combination_type=_value("combination_type", combination_type, "COMBINATION_TYPE_", _COMBINATIONS),
        lora_path=_value("lora_path", lora_path, "LORA_PATH_", _PATHS),
        top_logprobs=top_logprobs,
    )


def _ids(at: int, ids: Any) -> inference_pb2.TokenIds:
    if isinstance(ids, str):
        raise InvalidRequest(f"continuations[{at}]", "expected token ids, like the others")
    return _fill(inference_pb2.TokenIds, ids=ids, path=f"continuations[{at}].")


def tokenize_request(
    prompt: str | None = None,
    *,
    chat: Chat | None = None,
    adapter: str | None = None,
    adapters: Adapters = (),
) -> inference_pb2.TokenizeRequest:
    """Build the request of Tokenize; raises InvalidRequest."""
    return _fill(
        inference_pb2.TokenizeRequest,
        **_input(prompt=prompt, chat=chat),
        adapter=adapter,
        adapters=_adapters(adapters),
    )


def detokenize_request(
    token_ids: Iterable[int], *, adapter: str | None = None, adapters: Adapters = ()
) -> inference_pb2.DetokenizeRequest:
    """Build the request of Detokenize; raises InvalidRequest."""
    return _fill(
        inference_pb2.DetokenizeRequest,
        token_ids=list(token_ids),
        adapter=adapter,
        adapters=_adapters(adapters),
    )


def model_request(*, adapter: str | None = None, adapters: Adapters = ()) -> inference_pb2.GetModelRequest:
    """Build the request of GetModel; raises InvalidRequest."""
    return _fill(inference_pb2.GetModelRequest, adapter=adapter, adapters=_adapters(adapters))


def _adapters(adapters: Adapters) -> list[inference_pb2.AdapterRef]:
    """The contract's references, as long as they can be told apart; the server checks what they say."""
    if isinstance(adapters, str):
        raise InvalidRequest("adapters", "expected several; a single name is `adapter`")
    refs = []
    for at, given in enumerate(adapters):
        ref: Any = given
        if isinstance(ref, str):
            ref = AdapterRef(ref)
        elif isinstance(ref, tuple) and len(ref) == 2:
            ref = AdapterRef(*ref)
        if not isinstance(ref, AdapterRef):
            raise InvalidRequest(f"adapters[{at}]", "expected an AdapterRef, a name, or a name and a weight")
        refs.append(
            _fill(
                inference_pb2.AdapterRef,
                name=ref.name,
                generation=ref.generation,
                weight=ref.weight,
                path=f"adapters[{at}].",
            )
        )
    return refs


def unload_request(name: str, *, wait: bool) -> adapters_pb2.UnloadAdapterRequest:
    """Build the request of UnloadAdapter."""
    mode = adapters_pb2.UNLOAD_MODE_WAIT if wait else adapters_pb2.UNLOAD_MODE_REFUSE
    return adapters_pb2.UnloadAdapterRequest(name=name, mode=mode)


def update_adapter_request(name: str, *, merged: bool) -> adapters_pb2.UpdateAdapterRequest:
    """Build the request of UpdateAdapter; raises InvalidRequest."""
    return _fill(adapters_pb2.UpdateAdapterRequest, name=name, merged=merged)


def get_adapter_request(name: str, *, nearest_tokens: int) -> adapters_pb2.GetAdapterRequest:
    """Build the request of GetAdapter; raises InvalidRequest."""
    return _fill(adapters_pb2.GetAdapterRequest, name=name, nearest_tokens=nearest_tokens)


def list_adapters_request(page_size: int, page_token: str) -> adapters_pb2.ListAdaptersRequest:
    """Build the request of ListAdapters; raises InvalidRequest."""
    return _fill(adapters_pb2.ListAdaptersRequest, page_size=page_size, page_token=page_token)


def _input(**given: Any) -> dict[str, Any]:
    """The one input that is set, as the contract spells it.

    The server can't tell two inputs from one: a protobuf oneof keeps the last and drops the other.
    """
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        expected = ", ".join(given)
        raise InvalidRequest(names[1] if names else "prompt", f"expected exactly one of {expected}")
    name, value = names[0], given[names[0]]
    if name == "chat":
        value = _chat(value)
    elif name == "token_ids":
        value = {"ids": value}
    return {name: value}


def _chat(value: Chat) -> inference_pb2.Chat:
    messages = []
    for index, message in enumerate(value):
        if isinstance(message, ChatMessage):
            role, content = message.role, message.content
        else:
            try:
                role, content = message["role"], message["content"]
            except (KeyError, TypeError):
                raise InvalidRequest(
                    f"chat[{index}]", "expected a ChatMessage or a dict with role and content"
                ) from None
        messages.append(_fill(inference_pb2.ChatMessage, role=role, content=content, path=f"chat[{index}]."))
    return inference_pb2.Chat(messages=messages)


def _fill(message: type[_M], *, path: str = "", **fields: Any) -> _M:
    """A message with the fields that aren't None; names the one that protobuf can't hold."""
    filled = message()
    for name, value in fields.items():
        if value is None:
            continue
        try:
            filled.MergeFrom(message(**{name: value}))
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"{path}{name}", str(error)) from None
    return filled
