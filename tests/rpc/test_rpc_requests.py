from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from polygraft.core.names import check_name
from polygraft.errors import ContextLengthExceeded, InvalidRequest
from polygraft.rpc.requests import (
    adapter_refs,
    detokenize_request,
    generate_request,
    score_request,
    tokenize_request,
)
from polygraft_api.v1 import inference_pb2 as pb
from polygraft_types.requests import (
    AdapterRef,
    Chat,
    ChatMessage,
    CombinationType,
    LoraPath,
    Request,
    ResponseParams,
    ScoreRequest,
)
from tests.rpc.fake_engine import MODEL, replace


def convert(**fields: Any) -> Request:
    fields = fields if {"prompt", "token_ids", "chat"} & set(fields) else {"prompt": "hi", **fields}
    return generate_request(pb.GenerateRequest(**fields), "id-1", MODEL)


def convert_score(**fields: Any) -> ScoreRequest:
    given = {"prompt": "a", "continuations": ["b"]} | fields
    return score_request(pb.ScoreRequest(**given), "id-1", MODEL)


def test_unset_fields_take_the_models_defaults() -> None:
    request = convert(prompt="hi")
    assert request.id == "id-1"
    assert request.prompt == "hi"
    assert request.adapters == ()
    assert (request.lora_path, request.path_required) == (LoraPath.UNMERGED, False)
    assert replace(request.sampling, seed=0) == MODEL.default_sampling
    assert 0 <= request.sampling.seed < 2**63
    assert convert(prompt="hi").sampling.seed != request.sampling.seed
    assert request.stopping.max_new_tokens is None
    assert request.stopping.min_new_tokens == 0
    assert request.stopping.time_limit is None


def test_set_fields_arrive() -> None:
    request = convert(
        token_ids={"ids": [0, 999]},
        adapters=[{"name": "json", "generation": 3, "weight": 1.0}],
        lora_path=pb.LORA_PATH_UNMERGED,
        sampling={
            "temperature": 0,
            "top_p": 1,
            "top_k": 0,
            "min_p": 0,
            "seed": 0,
            "repetition_penalty": 1.5,
            "presence_penalty": -2,
            "frequency_penalty": 2,
            "logit_bias": {999: -100, 3: 100},
        },
        response={"logprobs": True, "top_logprobs": 20, "echo": True},
        stopping={
            "max_new_tokens": 5,
            "min_new_tokens": 5,
            "stop_sequences": ["a", "b" * 512],
            "stop_token_ids": [1],
            "ignore_eos": True,
            "time_limit": 1.5,
        },
    )
    assert request.prompt == (0, 999)
    assert request.adapters == (AdapterRef("json", generation=3),)
    assert request.lora_path is LoraPath.UNMERGED
    assert request.sampling.greedy
    assert (request.sampling.top_p, request.sampling.top_k, request.sampling.min_p) == (1, 0, 0)
    assert request.sampling.seed == 0
    assert request.sampling.repetition_penalty == 1.5
    assert (request.sampling.presence_penalty, request.sampling.frequency_penalty) == (-2, 2)
    assert request.sampling.logit_bias == ((3, 100), (999, -100))
    assert request.response == ResponseParams(logprobs=True, top_logprobs=20, echo=True)
    assert request.stopping.max_new_tokens == request.stopping.min_new_tokens == 5
    assert request.stopping.stop == ("a", "b" * 512)
    assert request.stopping.stop_token_ids == (1,)
    assert request.stopping.ignore_eos
    assert request.stopping.time_limit == 1.5


def test_chat_and_short_form() -> None:
    request = convert(chat={"messages": [{"role": "user", "content": "hi"}]}, adapter="json")
    assert request.prompt == Chat((ChatMessage("user", "hi"),))
    assert request.adapters == (AdapterRef("json", generation=None),)
    assert convert(adapters=[{"name": "json"}]).adapters == (AdapterRef("json", generation=None),)


def test_the_servers_path_is_the_default() -> None:
    message = pb.GenerateRequest(prompt="hi")
    merging = generate_request(message, "id", replace(MODEL, default_lora_path=LoraPath.MERGED))
    assert (merging.lora_path, merging.path_required) == (LoraPath.MERGED, False)
    assert convert(lora_path=pb.LORA_PATH_AUTO).lora_path is LoraPath.AUTO
    asked = convert(lora_path=pb.LORA_PATH_MERGED)
    assert (asked.lora_path, asked.path_required) == (LoraPath.MERGED, True)


NAN, INF = math.nan, math.inf
INVALID: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": ""}),
    ("token_ids.ids", {"token_ids": {}}),
    ("chat.messages", {"chat": {}}),
    ("chat.messages[1].role", {"chat": {"messages": [{"role": "user"}, {"content": "x"}]}}),
    ("adapters", {"adapter": "a", "adapters": [{"name": "a"}]}),
    *[
        ("adapter", {"adapter": name})
        for name in ("../x", "a/b", "a@1", ".a", "a b", "a" * 129, "é", "a\n", "-")
    ],
    ("adapters[0].name", {"adapters": [{"name": ""}]}),
    ("adapters[1].name", {"adapters": [{"name": "a"}, {"name": "../b"}]}),
    *[
        ("adapters[1].weight", {"adapters": [{"name": "b"}, {"name": "a", "weight": bad}]})
        for bad in (NAN, INF, -INF, 100.1, -100.1)
    ],
    ("adapters", {"adapters": [{"name": f"a{i}"} for i in range(9)]}),
    ("lora_path", {"lora_path": 17}),
    *[("combination_type", {"combination_type": bad}) for bad in (3, -1)],
    *[("sampling.temperature", {"sampling": {"temperature": bad}}) for bad in (-0.1, 100.1, NAN, INF, -INF)],
    *[("sampling.top_p", {"sampling": {"top_p": bad}}) for bad in (0, 1.01, -1, NAN, INF)],
    *[("sampling.min_p", {"sampling": {"min_p": bad}}) for bad in (-0.01, 1.01, NAN, INF)],
    *[("sampling.seed", {"sampling": {"seed": bad}}) for bad in (2**63, 2**64 - 1)],
    *[
        ("sampling.repetition_penalty", {"sampling": {"repetition_penalty": bad}})
        for bad in (0, -1, 100.1, NAN, INF, 1e-38, 0.9e-6)
    ],
    *[
        (f"sampling.{p}_penalty", {"sampling": {f"{p}_penalty": bad}})
        for p in ("presence", "frequency")
        for bad in (-2.1, 2.1, NAN, -INF)
    ],
    *[("sampling.logit_bias[1]", {"sampling": {"logit_bias": {1: bad}}}) for bad in (-101, 101, NAN, INF)],
    ("sampling.logit_bias", {"sampling": {"logit_bias": dict.fromkeys(range(1025), 1)}}),
    ("response.top_logprobs", {"response": {"top_logprobs": 21}}),
    *[("stopping.max_new_tokens", {"stopping": {"max_new_tokens": bad}}) for bad in (0, 128, 2**32 - 1)],
    ("stopping.min_new_tokens", {"stopping": {"max_new_tokens": 3, "min_new_tokens": 4}}),
    ("stopping.min_new_tokens", {"stopping": {"min_new_tokens": 257}}),
    ("stopping.stop_sequences", {"stopping": {"stop_sequences": ["x"] * 17}}),
    ("stopping.stop_sequences[1]", {"stopping": {"stop_sequences": ["x", ""]}}),
    ("stopping.stop_sequences[0]", {"stopping": {"stop_sequences": ["x" * 513]}}),
    ("stopping.stop_token_ids", {"stopping": {"stop_token_ids": [1] * 65}}),
    *[("stopping.time_limit", {"stopping": {"time_limit": bad}}) for bad in (0, -1, 86401, NAN, INF)],
]


@pytest.mark.parametrize(("field", "fields"), INVALID, ids=[f"{f}-{i}" for i, (f, _) in enumerate(INVALID)])
def test_bad_values_are_refused_by_their_path(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        convert(**fields)
    assert caught.value.field == field


def test_an_input_is_needed() -> None:
    with pytest.raises(InvalidRequest, match=r"^input: "):
        generate_request(pb.GenerateRequest(), "id", MODEL)


def test_several_adapters() -> None:
    refs = [{"name": "a"}, {"name": "b", "weight": -0.5, "generation": 2}, {"name": "c", "weight": 0.0}]
    expected = (AdapterRef("a"), AdapterRef("b", -0.5, 2), AdapterRef("c", weight=0.0))
    assert convert(adapters=refs).adapters == expected
    assert convert_score(adapters=refs).adapters == expected
    assert tokenize_request(pb.TokenizeRequest(prompt="x", adapters=refs), MODEL)[1] == expected
    assert adapter_refs(pb.DetokenizeRequest(adapters=refs)) == expected


@pytest.mark.parametrize("kind", [convert, convert_score])
def test_combination_types(kind: Callable[..., Request | ScoreRequest]) -> None:
    assert kind().combination_type is CombinationType.STACK
    for value in (pb.COMBINATION_TYPE_UNSPECIFIED, pb.COMBINATION_TYPE_STACK):
        assert kind(combination_type=value).combination_type is CombinationType.STACK
    assert kind(combination_type=pb.COMBINATION_TYPE_LINEAR).combination_type is CombinationType.LINEAR
    with pytest.raises(InvalidRequest, match="combination_type: unknown value 3"):
        kind(combination_type=3)


def test_the_models_own_repetition_penalty_is_the_default() -> None:
    sampling = replace(MODEL.default_sampling, repetition_penalty=1.1)
    model = replace(MODEL, default_sampling=sampling)
    message = pb.GenerateRequest(prompt="hi")
    assert generate_request(message, "id", model).sampling.repetition_penalty == 1.1
    message.sampling.repetition_penalty = 1.0
    assert generate_request(message, "id", model).sampling.repetition_penalty == 1.0


def test_score_request() -> None:
    request = convert_score(adapters=[{"name": "json", "generation": 3}], top_logprobs=20)
    assert request == ScoreRequest(
        "id-1", "a", ("b",), (AdapterRef("json", generation=3),), LoraPath.UNMERGED, False, 20
    )
    assert convert_score(prompt="", continuations=["b"] * 256).prompt == ""
    ids = pb.ScoreRequest(token_ids={"ids": [1]}, continuation_token_ids=[{"ids": [2, 999]}, {"ids": [3]}])
    request = score_request(ids, "id", MODEL)
    assert (request.prompt, request.continuations) == ((1,), ((2, 999), (3,)))
    assert request.lora_path is LoraPath.UNMERGED
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="x")])
    chatty = score_request(pb.ScoreRequest(chat=chat, continuations=["b"]), "id", MODEL)
    assert chatty.prompt == Chat((ChatMessage("user", "x"),))


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("continuations", {"continuations": []}),
        ("continuations", {"continuations": ["b"] * 257}),
        ("continuations[1]", {"continuations": ["b", ""]}),
        ("continuation_token_ids", {"continuation_token_ids": [{"ids": [1]}]}),
        ("continuation_token_ids", {"continuations": [], "continuation_token_ids": [{"ids": [1]}] * 257}),
        ("continuation_token_ids[0].ids", {"continuations": [], "continuation_token_ids": [{}]}),
        ("adapters", {"adapter": "a", "adapters": [{"name": "a"}]}),
        ("adapter", {"adapter": "../a"}),
        ("lora_path", {"lora_path": 17}),
    *[("combination_type", {"combination_type": bad}) for bad in (3, -1)],
        ("top_logprobs", {"top_logprobs": 21}),
    ],
)  # fmt: skip
def test_bad_scores_are_refused_by_their_path(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        convert_score(**fields)
    assert caught.value.field == field


def test_a_score_needs_an_input_and_takes_what_generate_takes() -> None:
    with pytest.raises(InvalidRequest, match=r"^input: "):
        score_request(pb.ScoreRequest(continuations=["b"]), "id", MODEL)
    with pytest.raises(InvalidRequest, match=r"^token_ids.ids: "):
        score_request(pb.ScoreRequest(token_ids={}, continuations=["b"]), "id", MODEL)


def test_tokenize_request() -> None:
    assert tokenize_request(pb.TokenizeRequest(prompt="", adapter="json"), MODEL) == (
        "",
        (AdapterRef("json"),),
    )
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="x")])
    assert tokenize_request(pb.TokenizeRequest(chat=chat), MODEL) == (Chat((ChatMessage("user", "x"),)), ())
    with pytest.raises(InvalidRequest, match="input"):
        tokenize_request(pb.TokenizeRequest(), MODEL)


def test_a_long_bad_name_is_not_echoed_whole() -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_name("x" * 10**6, "adapter")
    assert len(str(caught.value)) < 200
    assert check_name("A0._-" + "x" * 123, "adapter")


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 129)), "token_ids.ids"),
        (pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage()] * 129)), "chat.messages"),
        (pb.TokenizeRequest(chat=pb.Chat(messages=[pb.ChatMessage()] * 129)), "chat.messages"),
        (pb.DetokenizeRequest(token_ids=[1] * 129), "token_ids"),
        (pb.ScoreRequest(chat=pb.Chat(messages=[pb.ChatMessage()] * 129), continuations=["x"]), "chat.messages"),
        (pb.ScoreRequest(prompt="x", continuation_token_ids=[pb.TokenIds(ids=[1] * 129)]),
         "continuation_token_ids[0].ids"),
    ],
)  # fmt: skip
def test_what_the_context_cant_hold_is_refused_before_its_elements_are_looked_at(
    message: Any, field: str
) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"129 .*the context holds 128 tokens") as caught:
        match message:
            case pb.GenerateRequest():
                generate_request(message, "r", MODEL)
            case pb.ScoreRequest():
                score_request(message, "r", MODEL)
            case pb.TokenizeRequest():
                tokenize_request(message, MODEL)
            case _:
                detokenize_request(message, MODEL)
    assert caught.value.field == field
