"""From protobuf to the domain: every range that the protos state is checked here and nowhere else."""

from __future__ import annotations

import secrets
from typing import Literal

from google.protobuf.message import Message

from polygraft.core.names import check_name
from polygraft.engine.client import ModelInfo
from polygraft.errors import ContextLengthExceeded, InvalidRequest
from polygraft_api.v1 import inference_pb2 as pb
from polygraft_types.requests import (
    DEFAULT_MAX_NEW_TOKENS,
    AdapterRef,
    Chat,
    ChatMessage,
    CombinationType,
    LoraPath,
    Request,
    ResponseParams,
    SamplingParams,
    ScoreRequest,
    StoppingParams,
)

_Penalty = Literal["repetition_penalty", "presence_penalty", "frequency_penalty"]

_MAX_STOP_SEQUENCES = 16
_MAX_STOP_CHARACTERS = 512
_MAX_STOP_TOKEN_IDS = 64
_MAX_TIME_LIMIT = 86400.0
_MAX_BIASES = 1024
_MAX_BIAS = 100.0
_MAX_TOP_LOGPROBS = 20
_MAX_CONTINUATIONS = 256
_MAX_ADAPTERS = 8
_MAX_WEIGHT = 100.0

_NamesAdapters = (
    pb.GenerateRequest | pb.ScoreRequest | pb.TokenizeRequest | pb.DetokenizeRequest | pb.GetModelRequest
)


def generate_request(message: pb.GenerateRequest, request_id: str, model: ModelInfo) -> Request:
    """A generation with every value settled.

    Raises:
        InvalidRequest: a field is wrong.
    """
    return Request(
        id=request_id,
        prompt=_input(message, model),
        adapters=adapter_refs(message),
        lora_path=_lora_path(message.lora_path, model.default_lora_path),
        path_required=message.lora_path != pb.LORA_PATH_UNSPECIFIED,
        sampling=_sampling(message.sampling, model),
        stopping=_stopping(message.stopping, model),
        response=_response(message.response),
        combination_type=_combination_type(message.combination_type),
    )


def score_request(message: pb.ScoreRequest, request_id: str, model: ModelInfo) -> ScoreRequest:
    """Continuations to score. Raises: as `generate_request`."""
    empty = message.WhichOneof("input") == "prompt" and not message.prompt
    prompt = "" if empty else _input(message, model)
    return ScoreRequest(
        id=request_id,
        prompt=prompt,
        continuations=_continuations(message, model),
        adapters=adapter_refs(message),
        lora_path=_lora_path(message.lora_path, model.default_lora_path),
        path_required=message.lora_path != pb.LORA_PATH_UNSPECIFIED,
        top_logprobs=_top_logprobs("top_logprobs", message.top_logprobs),
        combination_type=_combination_type(message.combination_type),
    )


def _continuations(message: pb.ScoreRequest, model: ModelInfo) -> tuple[str | tuple[int, ...], ...]:
    texts, ids = message.continuations, message.continuation_token_ids
    if texts and ids:
        raise InvalidRequest("continuation_token_ids", "must be empty where continuations is set")
    fits = 1 <= len(texts) + len(ids) <= _MAX_CONTINUATIONS
    field = "continuation_token_ids" if ids else "continuations"
    _check(field, fits, f"of 1 to {_MAX_CONTINUATIONS} elements", len(texts) + len(ids))
    for index, text in enumerate(texts):
        if not text:
            raise InvalidRequest(f"continuations[{index}]", "must not be empty")
    for index, tokens in enumerate(ids):
        if not tokens.ids:
            raise InvalidRequest(f"continuation_token_ids[{index}].ids", "must not be empty")
        _check_room(f"continuation_token_ids[{index}].ids", len(tokens.ids), "token ids", model)
    return tuple(texts) or tuple(tuple(tokens.ids) for tokens in ids)


def tokenize_request(
    message: pb.TokenizeRequest, model: ModelInfo
) -> tuple[str | Chat, tuple[AdapterRef, ...]]:
    """The input to tokenize, and the adapters whose way it is. Raises InvalidRequest."""
    adapters = adapter_refs(message)
    match message.WhichOneof("input"):
        case "prompt":
            return message.prompt, adapters
        case "chat":
            return _chat(message.chat, model), adapters
    raise InvalidRequest("input", "one of prompt and chat must be set")


def detokenize_request(
    message: pb.DetokenizeRequest, model: ModelInfo
) -> tuple[tuple[int, ...], tuple[AdapterRef, ...]]:
    """The ids to decode, and the adapters whose tokenizer does it. Raises InvalidRequest."""
    _check_room("token_ids", len(message.token_ids), "token ids", model)
    return tuple(message.token_ids), adapter_refs(message)


def elements(message: Message) -> int:
    """How many elements of a message are converted one by one, which is cheap to count."""
    match message:
        case pb.ScoreRequest():
            own = len(message.continuations) + len(message.continuation_token_ids)
            return own + len(message.chat.messages)
        case pb.GenerateRequest():
            return len(message.chat.messages) + len(message.sampling.logit_bias)
        case pb.TokenizeRequest():
            return len(message.chat.messages)
    return 0


def _check_room(field: str, count: int, what: str, model: ModelInfo) -> None:
    """Raise ContextLengthExceeded for more than the context can hold, before any other work."""
    if count > model.context_length:
        raise ContextLengthExceeded(field, f"{count} {what}, the context holds {model.context_length} tokens")


def _input(message: pb.GenerateRequest | pb.ScoreRequest, model: ModelInfo) -> str | tuple[int, ...] | Chat:
    match message.WhichOneof("input"):
        case "prompt":
            if not message.prompt:
                raise InvalidRequest("prompt", "must not be empty")
            return message.prompt
        case "token_ids":
            _check_room("token_ids.ids", len(message.token_ids.ids), "token ids", model)
            ids = tuple(message.token_ids.ids)
            if not ids:
                raise InvalidRequest("token_ids.ids", "must not be empty")
            return ids
        case "chat":
            return _chat(message.chat, model)
    raise InvalidRequest("input", "one of prompt, token_ids and chat must be set")


def _chat(chat: pb.Chat, model: ModelInfo) -> Chat:
    if not chat.messages:
        raise InvalidRequest("chat.messages", "must not be empty")
    # Templates turn every message into at least one token.
    _check_room("chat.messages", len(chat.messages), "messages", model)
    for index, turn in enumerate(chat.messages):
        if not turn.role:
            raise InvalidRequest(f"chat.messages[{index}].role", "must not be empty")
    return Chat(tuple(ChatMessage(turn.role, turn.content) for turn in chat.messages))


def adapter_refs(message: _NamesAdapters) -> tuple[AdapterRef, ...]:
    """The adapters that a message names, in their order. Raises InvalidRequest."""
    if message.adapter and message.adapters:
        raise InvalidRequest("adapters", "must be empty where adapter is set: it is the short form")
    if message.adapter:
        return (AdapterRef(check_name(message.adapter, "adapter")),)
    count = len(message.adapters)
    _check("adapters", count <= _MAX_ADAPTERS, f"at most {_MAX_ADAPTERS} elements", count)
    refs = []
    for index, ref in enumerate(message.adapters):
        name = check_name(ref.name, f"adapters[{index}].name")
        weight = ref.weight if ref.HasField("weight") else 1.0
        _check(f"adapters[{index}].weight", -_MAX_WEIGHT <= weight <= _MAX_WEIGHT, "in [-100, 100]", weight)
        refs.append(AdapterRef(name, weight, ref.generation or None))
    return tuple(refs)


def _lora_path(value: int, default: LoraPath) -> LoraPath:
    if value == pb.LORA_PATH_UNSPECIFIED:
        return default
    if value not in pb.LoraPath.values():
        raise InvalidRequest("lora_path", f"unknown value {value}")
    return LoraPath[pb.LoraPath.Name(pb.LoraPath.ValueType(value)).removeprefix("LORA_PATH_")]


def _combination_type(value: int) -> CombinationType:
    if value == pb.COMBINATION_TYPE_UNSPECIFIED:
        return CombinationType.STACK
    if value not in pb.CombinationType.values():
        raise InvalidRequest("combination_type", f"unknown value {value}")
    name = pb.CombinationType.Name(pb.CombinationType.ValueType(value))
    return CombinationType[name.removeprefix("COMBINATION_TYPE_")]


def _sampling(options: pb.SamplingOptions, model: ModelInfo) -> SamplingParams:
    default = model.default_sampling

    def given(name: Literal["temperature", "top_p", "min_p"] | _Penalty) -> float:
        value: float = getattr(options if options.HasField(name) else default, name)
        return value

    temperature, top_p, min_p = given("temperature"), given("top_p"), given("min_p")
    repetition, presence = given("repetition_penalty"), given("presence_penalty")
    frequency = given("frequency_penalty")
    seed = options.seed if options.HasField("seed") else secrets.randbits(63)
    _check("sampling.temperature", 0 <= temperature <= 100, "in [0, 100]", temperature)
    _check("sampling.top_p", 0 < top_p <= 1, "in (0, 1]", top_p)
    _check("sampling.min_p", 0 <= min_p <= 1, "in [0, 1]", min_p)
    _check("sampling.seed", seed < 2**63, "in [0, 2^63)", seed)
    # A smaller one would turn different logits into float32's largest number.
    _check("sampling.repetition_penalty", 1e-6 <= repetition <= 100, "in [1e-6, 100]", repetition)
    _check("sampling.presence_penalty", -2 <= presence <= 2, "in [-2, 2]", presence)
    _check("sampling.frequency_penalty", -2 <= frequency <= 2, "in [-2, 2]", frequency)
    return SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=options.top_k if options.HasField("top_k") else default.top_k,
        min_p=min_p,
        seed=seed,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=_logit_bias(options),
    )


def _logit_bias(options: pb.SamplingOptions) -> tuple[tuple[int, float], ...]:
    count = len(options.logit_bias)
    _check("sampling.logit_bias", count <= _MAX_BIASES, f"at most {_MAX_BIASES} elements", count)
    biases = tuple(sorted(options.logit_bias.items()))
    for token, bias in biases:
        _check(f"sampling.logit_bias[{token}]", -_MAX_BIAS <= bias <= _MAX_BIAS, "in [-100, 100]", bias)
    return biases


def _response(options: pb.ResponseOptions) -> ResponseParams:
    return ResponseParams(
        logprobs=options.logprobs,
        top_logprobs=_top_logprobs("response.top_logprobs", options.top_logprobs),
        echo=options.echo,
    )


def _top_logprobs(field: str, count: int) -> int:
    _check(field, count <= _MAX_TOP_LOGPROBS, f"in [0, {_MAX_TOP_LOGPROBS}]", count)
    return count


def _stopping(options: pb.StoppingOptions, model: ModelInfo) -> StoppingParams:
    most = options.max_new_tokens if options.HasField("max_new_tokens") else None
    limit = model.context_length
    if most is not None:
        _check("stopping.max_new_tokens", 1 <= most < limit, f"in [1, {limit})", most)
    least = options.min_new_tokens
    cap = DEFAULT_MAX_NEW_TOKENS if most is None else most
    _check("stopping.min_new_tokens", least <= cap, f"in [0, max_new_tokens = {cap}]", least)
    count = len(options.stop_sequences)
    _check("stopping.stop_sequences", count <= _MAX_STOP_SEQUENCES, "at most 16", count)
    stop = tuple(options.stop_sequences)
    for index, text in enumerate(stop):
        fits = 1 <= len(text) <= _MAX_STOP_CHARACTERS
        _check(f"stopping.stop_sequences[{index}]", fits, "of 1 to 512 characters", len(text))
    count = len(options.stop_token_ids)
    _check("stopping.stop_token_ids", count <= _MAX_STOP_TOKEN_IDS, "at most 64", count)
    ids = tuple(options.stop_token_ids)
    time_limit = options.time_limit if options.HasField("time_limit") else None
    if time_limit is not None:
        fits = 0 < time_limit <= _MAX_TIME_LIMIT
        _check("stopping.time_limit", fits, "above 0 and at most 86400 seconds", time_limit)
    return StoppingParams(
        max_new_tokens=most,
        min_new_tokens=least,
        stop=stop,
        stop_token_ids=ids,
        ignore_eos=options.ignore_eos,
        time_limit=time_limit,
    )


def _check(field: str, fits: bool, accepted: str, value: float) -> None:
    """Comparisons with NaN are false, so a range that is stated as one refuses it."""
    if not fits:
        raise InvalidRequest(field, f"must be {accepted}, got {value}")
