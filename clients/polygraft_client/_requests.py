"""Converts arguments to messages of the contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar, get_args

from google.protobuf.message import Message

from polygraft_api.v1 import inference_pb2
from polygraft_client._exceptions import InvalidRequest
from polygraft_types.requests import AdapterRef, ChatMessage, CombinationType, LoraPath

Chat = Sequence[ChatMessage | Mapping[str, str]]
"""A conversation: `ChatMessage`s, or dicts with the keys "role" and "content"."""
AdapterRefs = Sequence[AdapterRef | str | tuple[str, float]]
"""Several adapters: `AdapterRef`s, names, or names with weights."""
Continuations = Sequence[str] | Sequence[Sequence[int]]
"""The texts to score, or their token ids."""

LoraPathName = Literal["auto", "unmerged", "merged"]
"""A `LoraPath` that may be asked for."""
CombinationName = Literal["stack", "linear"]
"""A `CombinationType`."""
_M = TypeVar("_M", bound=Message)


class GenerateOptions(TypedDict, total=False):
    """The keyword arguments of `generate` and `stream`; all are optional.

    For options that are left out, the server takes the value of the model's generation_config, or else the
    contract's documented default.
    """

    token_ids: Sequence[int]
    """The input as token ids, instead of `prompt`."""
    chat: Chat
    """The input as a conversation, instead of `prompt`; rendered through the model's chat template."""
    adapter: str | None
    """Name of the adapter; None is the base model."""
    adapters: AdapterRefs
    """Several adapters instead, at most 8, in the order in which they are applied; or one with a weight."""
    combination_type: CombinationType | CombinationName
    """How several adapters combine."""
    lora_path: LoraPath | LoraPathName
    """How LoRA runs: "unmerged" computes a side path, "merged" runs on a copy of the weights with the adapter
    merged in, "auto" lets the server choose."""
    temperature: float | None
    """0 and anything below 1e-6 is greedy. Range [0, 100]."""
    top_p: float | None
    """Keep the smallest set of tokens whose probability reaches this. Range (0, 1]."""
    top_k: int | None
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float | None
    """Drop tokens whose probability is below this share of the highest one. Range [0, 1]."""
    seed: int | None
    """The sampling noise depends on this and on the position, on nothing else. Range [0, 2^63)."""
    repetition_penalty: float | None
    """Values above 1 make tokens of the prompt and the answer so far less likely. Range [1e-6, 100]."""
    presence_penalty: float | None
    """Subtracted from the logits of tokens in the answer so far. Range [-2, 2]."""
    frequency_penalty: float | None
    """Like `presence_penalty`, times how often the token occurs. Range [-2, 2]."""
    logit_bias: Mapping[int, float]
    """Maps token ids to what is added to their logits, in [-100, 100]. At most 1024."""
    max_new_tokens: int | None
    """Most tokens to generate."""
    min_new_tokens: int | None
    """End-of-sequence tokens, stop tokens and stop sequences are ignored before this many tokens."""
    stop: str | Sequence[str]
    """The text ends before the first of these that appears. At most 16."""
    stop_token_ids: Sequence[int]
    """Token ids that end the request and aren't part of the text. At most 64."""
    ignore_eos: bool
    """Continue past the model's end-of-sequence tokens."""
    time_limit: float | None
    """Seconds after arrival, queueing included; the answer is then cut off with TIME_LIMIT."""
    return_token_ids: bool
    """Return the answer's `token_ids`."""
    logprobs: bool
    """Return the answer's `logprobs`."""
    top_logprobs: int
    """How many of the most likely tokens to return at each position in `logprobs`. Range [0, 20]."""
    echo: bool
    """Begin the answer with the prompt: its text, and its tokens and logprobs if these are asked for."""
    timeout: float | None
    """Seconds until the call fails with DeadlineExceeded; None is the client's own."""


def split_timeout(options: GenerateOptions) -> tuple[float | None, dict[str, Any]]:
    """Split the options into the call's timeout and the request's fields."""
    fields: dict[str, Any] = {**options}
    return fields.pop("timeout", None), fields


def generate_request(
    prompt: str | None = None,
    *,
    token_ids: Sequence[int] | None = None,
    chat: Chat | None = None,
    adapter: str | None = None,
    adapters: AdapterRefs = (),
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
    return fill(
        inference_pb2.GenerateRequest,
        **one_input(prompt=prompt, token_ids=token_ids, chat=chat),
        adapter=adapter,
        adapters=adapter_refs(adapters),
        combination_type=enum_name("combination_type", combination_type, CombinationName),
        lora_path=enum_name("lora_path", lora_path, LoraPathName),
        sampling=fill(
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
        stopping=fill(
            inference_pb2.StoppingOptions,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            stop_sequences=[stop] if isinstance(stop, str) else list(stop),
            stop_token_ids=list(stop_token_ids),
            ignore_eos=ignore_eos,
            time_limit=time_limit,
        ),
        response=fill(
            inference_pb2.ResponseOptions,
            token_ids=return_token_ids,
            logprobs=logprobs,
            top_logprobs=top_logprobs,
            echo=echo,
        ),
    )


def enum_name(argument: str, given: str | None, names: Any) -> str | None:
    """The contract's name of a value of one of the `Literal`s above; raises InvalidRequest."""
    if given is None:
        return None
    known = get_args(names)
    if not isinstance(given, str) or given.lower() not in known:
        raise InvalidRequest(argument, f"expected {' or '.join(map(repr, known))}, got {given!r}")
    return f"{argument.upper()}_{given.upper()}"


def texts_or_ids(continuations: Continuations) -> dict[str, Any]:
    """The field that continuations go into, as its name and value; raises InvalidRequest."""
    texts: list[Any] = [continuations] if isinstance(continuations, str) else list(continuations)
    if all(isinstance(text, str) for text in texts):
        return {"continuations": texts}
    return {"continuation_token_ids": [_ids(at, ids) for at, ids in enumerate(texts)]}


def _ids(at: int, ids: Any) -> inference_pb2.TokenIds:
    if isinstance(ids, str):
        raise InvalidRequest(f"continuations[{at}]", "expected token ids, like the others")
    return fill(inference_pb2.TokenIds, ids=ids, path=f"continuations[{at}].")


def adapter_refs(adapters: AdapterRefs) -> list[inference_pb2.AdapterRef]:
    """Convert to the contract's references; the server checks names and weights. Raises InvalidRequest."""
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
            fill(
                inference_pb2.AdapterRef,
                name=ref.name,
                generation=ref.generation,
                weight=None if ref.weight == 1.0 else ref.weight,
                path=f"adapters[{at}].",
            )
        )
    return refs


def one_input(**given: Any) -> dict[str, Any]:
    """The only input that is set, as a field's name and value; raises InvalidRequest.

    Two inputs must be refused here: a protobuf oneof silently keeps the last.
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
        messages.append(fill(inference_pb2.ChatMessage, role=role, content=content, path=f"chat[{index}]."))
    return inference_pb2.Chat(messages=messages)


def fill(message: type[_M], *, path: str = "", **fields: Any) -> _M:
    """A message with the fields that aren't None; raises InvalidRequest for a value that doesn't fit."""
    filled = message()
    for name, value in fields.items():
        if value is None:
            continue
        try:
            filled.MergeFrom(message(**{name: value}))
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"{path}{name}", str(error)) from None
    return filled
