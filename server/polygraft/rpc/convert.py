"""From protobuf to the domain: every range that the protos state is checked here and nowhere else."""

from __future__ import annotations

import math
import secrets

from polygraft.adapters.names import check_name
from polygraft.engine.handle import ModelInfo
from polygraft.engine.request import (
    DEFAULT_MAX_NEW_TOKENS,
    AdapterRef,
    Chat,
    ChatMessage,
    LoraPath,
    Request,
    SamplingParams,
    StoppingParams,
)
from polygraft.errors import InvalidRequest, NotSupported
from polygraft_api.v1 import inference_pb2 as pb

_MAX_STOP_SEQUENCES = 16
_MAX_STOP_CHARACTERS = 512
_MAX_STOP_TOKEN_IDS = 64
_MAX_TIME_LIMIT = 86400.0
_NEUTRAL_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def generate_request(message: pb.GenerateRequest, request_id: str, model: ModelInfo) -> Request:
    """A generation with every value settled.

    Raises:
        InvalidRequest: a field is wrong; all fields are checked before any NotSupported.
        NotSupported: a field asks for what the contract names and this server doesn't serve.
    """
    request = Request(
        id=request_id,
        prompt=_input(message, model),
        adapter=_adapter(message),
        lora_path=_lora_path(message.lora_path, model.default_lora_path),
        path_required=message.lora_path != pb.LORA_PATH_UNSPECIFIED,
        sampling=_sampling(message.sampling, model.default_sampling),
        stopping=_stopping(message.stopping, model),
    )
    _refuse_unserved(message)
    return request


def tokenize_request(message: pb.TokenizeRequest, model: ModelInfo) -> str | Chat:
    """The input to tokenize. Raises InvalidRequest."""
    match message.WhichOneof("input"):
        case "prompt":
            return message.prompt
        case "chat":
            return _chat(message.chat, model)
    raise InvalidRequest("input", "one of prompt and chat must be set")


def _input(message: pb.GenerateRequest, model: ModelInfo) -> str | tuple[int, ...] | Chat:
    match message.WhichOneof("input"):
        case "prompt":
            if not message.prompt:
                raise InvalidRequest("prompt", "must not be empty")
            return message.prompt
        case "token_ids":
            ids = tuple(message.token_ids.ids)
            if not ids:
                raise InvalidRequest("token_ids.ids", "must not be empty")
            _check_token_ids("token_ids.ids", ids, model)
            return ids
        case "chat":
            return _chat(message.chat, model)
    raise InvalidRequest("input", "one of prompt, token_ids and chat must be set")


def _chat(chat: pb.Chat, model: ModelInfo) -> Chat:
    if not model.has_chat_template:
        raise InvalidRequest("chat", "the model has no chat template; use prompt or token_ids")
    if not chat.messages:
        raise InvalidRequest("chat.messages", "must not be empty")
    for index, turn in enumerate(chat.messages):
        if not turn.role:
            raise InvalidRequest(f"chat.messages[{index}].role", "must not be empty")
    return Chat(tuple(ChatMessage(turn.role, turn.content) for turn in chat.messages))


def _adapter(message: pb.GenerateRequest) -> AdapterRef | None:
    if message.adapter and message.adapters:
        raise InvalidRequest("adapters", "must be empty where adapter is set: it is the short form")
    if message.adapter:
        return AdapterRef(check_name(message.adapter, "adapter"))
    refs = []
    for index, ref in enumerate(message.adapters):
        name = check_name(ref.name, f"adapters[{index}].name")
        _finite(f"adapters[{index}].weight", ref.weight)
        refs.append(AdapterRef(name, ref.generation or None))
    return refs[0] if refs else None


def _lora_path(value: int, default: LoraPath) -> LoraPath:
    if value == pb.LORA_PATH_UNSPECIFIED:
        return default
    if value not in pb.LoraPath.values():
        raise InvalidRequest("lora_path", f"unknown value {value}")
    return LoraPath[pb.LoraPath.Name(pb.LoraPath.ValueType(value)).removeprefix("LORA_PATH_")]


def _sampling(options: pb.SamplingOptions, default: SamplingParams) -> SamplingParams:
    for name in _NEUTRAL_PENALTIES:
        _finite(f"sampling.{name}", getattr(options, name))
    for bias in options.logit_bias.values():
        _finite("sampling.logit_bias", bias)
    temperature = options.temperature if options.HasField("temperature") else default.temperature
    top_p = options.top_p if options.HasField("top_p") else default.top_p
    min_p = options.min_p if options.HasField("min_p") else default.min_p
    seed = options.seed if options.HasField("seed") else secrets.randbits(63)
    _check("sampling.temperature", 0 <= temperature <= 100, "in [0, 100]", temperature)
    _check("sampling.top_p", 0 < top_p <= 1, "in (0, 1]", top_p)
    _check("sampling.min_p", 0 <= min_p <= 1, "in [0, 1]", min_p)
    _check("sampling.seed", seed < 2**63, "in [0, 2^63)", seed)
    return SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=options.top_k if options.HasField("top_k") else default.top_k,
        min_p=min_p,
        seed=seed,
    )


def _stopping(options: pb.StoppingOptions, model: ModelInfo) -> StoppingParams:
    most = options.max_new_tokens if options.HasField("max_new_tokens") else None
    limit = model.context_length
    if most is not None:
        _check("stopping.max_new_tokens", 1 <= most < limit, f"in [1, {limit})", most)
    least = options.min_new_tokens
    cap = DEFAULT_MAX_NEW_TOKENS if most is None else most
    _check("stopping.min_new_tokens", least <= cap, f"in [0, max_new_tokens = {cap}]", least)
    stop = tuple(options.stop_sequences)
    _check("stopping.stop_sequences", len(stop) <= _MAX_STOP_SEQUENCES, "at most 16", len(stop))
    for index, text in enumerate(stop):
        fits = 1 <= len(text) <= _MAX_STOP_CHARACTERS
        _check(f"stopping.stop_sequences[{index}]", fits, "of 1 to 512 characters", len(text))
    ids = tuple(options.stop_token_ids)
    _check("stopping.stop_token_ids", len(ids) <= _MAX_STOP_TOKEN_IDS, "at most 64", len(ids))
    _check_token_ids("stopping.stop_token_ids", ids, model)
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


def _refuse_unserved(message: pb.GenerateRequest) -> None:
    if len(message.adapters) > 1:
        raise NotSupported("adapters", "more than one adapter in a request is not served yet")
    if message.adapters and message.adapters[0].HasField("weight") and message.adapters[0].weight != 1:
        raise NotSupported("adapters[0].weight", "a weight other than 1 is not served yet")
    sampling, response = message.sampling, message.response
    for name, neutral in _NEUTRAL_PENALTIES.items():
        if sampling.HasField(name) and getattr(sampling, name) != neutral:  # type: ignore[arg-type]
            raise NotSupported(f"sampling.{name}", f"a value other than {neutral:g} is not served yet")
    if sampling.logit_bias:
        raise NotSupported("sampling.logit_bias", "not served yet")
    for field, asked in (
        ("logprobs", response.logprobs),
        ("top_logprobs", response.top_logprobs > 0),
        ("echo", response.echo),
    ):
        if asked:
            raise NotSupported(f"response.{field}", "not served yet")


def _check_token_ids(field: str, ids: tuple[int, ...], model: ModelInfo) -> None:
    size = model.vocabulary_size
    if ids and max(ids) >= size:
        index = next(index for index, token in enumerate(ids) if token >= size)
        raise InvalidRequest(f"{field}[{index}]", f"must be in [0, {size}), got {ids[index]}")


def _check(field: str, fits: bool, accepted: str, value: float) -> None:
    """Comparisons with NaN are false, so a range that is stated as one refuses it."""
    if not fits:
        raise InvalidRequest(field, f"must be {accepted}, got {value}")


def _finite(field: str, value: float) -> None:
    if not math.isfinite(value):
        raise InvalidRequest(field, f"must be finite, got {value}")
