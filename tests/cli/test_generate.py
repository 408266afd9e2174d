"""`polygraft generate` against a scripted server."""

from __future__ import annotations

import json

import pytest

from polygraft_api.v1 import inference_pb2
from tests.client.scripted import Script

from .conftest import Invoke


def test_prints_the_answer_and_nothing_else(call: Invoke) -> None:
    result = call("generate", "Hello", "--adapter", "mood")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "MOOD one two three\n", "")


def test_several_adapters_and_weights(call: Invoke, script: Script) -> None:
    call("generate", "Hello", "--adapter", "mood", "--adapter", "headline:0.5")
    call("generate", "Hello", "--adapter", "mood:-2")
    call("generate", "Hello", "--adapter", "mood")
    call("score", "Hello", "a", "--adapter", "mood:1", "--adapter", "headline")
    ref = inference_pb2.AdapterRef
    requests = [request for request in script.requests if hasattr(request, "combination_type")]
    assert [(request.adapter, list(request.adapters)) for request in requests] == [
        ("", [ref(name="mood"), ref(name="headline", weight=0.5)]),
        ("", [ref(name="mood", weight=-2)]),
        ("mood", []),
        ("", [ref(name="mood"), ref(name="headline")]),
    ]


def test_combination_types(call: Invoke, script: Script) -> None:
    two = ("--adapter", "mood", "--adapter", "headline:0.5")
    for given in ((), ("--combination-type", "stack"), ("--combination-type", "LINEAR")):
        assert call("generate", "Hello", *two, *given).exit_code == 0
        assert call("score", "Hello", "a", *two, *given).exit_code == 0
    requests = [request for request in script.requests if hasattr(request, "combination_type")]
    assert [request.combination_type for request in requests] == [0, 0, 1, 1, 2, 2]
    result = call("generate", "Hello", *two, "--combination-type", "cat")
    assert result.exit_code == 2
    assert "--combination-type" in result.stderr


@pytest.mark.parametrize("adapter", ["mood:", "mood:much", "mood:0.5:1"])
def test_a_weight_that_is_none(call: Invoke, script: Script, adapter: str) -> None:
    result = call("generate", "Hello", "--adapter", adapter)
    assert result.exit_code == 2
    assert "--adapter" in result.stderr
    assert script.requests == []


def test_streaming_prints_the_same(call: Invoke) -> None:
    plain, streamed = call("generate", "Hello", "--no-stream"), call("generate", "Hello", "--stream")
    assert streamed.stdout == plain.stdout == "one two three\n"


@pytest.mark.parametrize(
    ("flags", "template", "chat"),
    [([], True, True), ([], False, False), (["--chat"], False, True), (["--raw"], True, False)],
)
def test_chat_or_raw(call: Invoke, script: Script, flags: list[str], template: bool, chat: bool) -> None:
    script.has_chat_template = template
    call("generate", "Hello", *flags)
    request = script.requests[-1]
    expected = inference_pb2.GenerateRequest()
    if chat:
        expected.chat.messages.add(role="user", content="Hello")
    else:
        expected.prompt = "Hello"
    assert request.WhichOneof("input") == expected.WhichOneof("input")
    assert (request.prompt, request.chat) == (expected.prompt, expected.chat)


@pytest.mark.parametrize(
    ("flags", "chat"),
    [
        (["--adapter", "mood"], True),
        (["--adapter", "mood:0.5"], True),
        (["--adapter", "headline", "--adapter", "mood"], True),
        (["--adapter", "headline"], False),
        ([], False),
        (["--adapter", "mood", "--raw"], False),
    ],
)
def test_a_template_that_only_the_adapter_has(
    call: Invoke, script: Script, flags: list[str], chat: bool
) -> None:
    script.has_chat_template, script.with_template = False, {"mood"}
    assert call("generate", "Hello", *flags).exit_code == 0
    assert script.requests[-1].WhichOneof("input") == ("chat" if chat else "prompt")


def test_flags_reach_the_server(call: Invoke, script: Script) -> None:
    flags = "--temperature 0.5 --top-p 0.9 --top-k 40 --min-p 0.1 --seed 3 --max-new-tokens 9"
    flags += " --repetition-penalty 1.5 --presence-penalty -1 --frequency-penalty 2"
    flags += " --logit-bias 5=1.5 --logit-bias 7=-100 --logprobs --top-logprobs 3 --echo"
    flags += " --min-new-tokens 2 --stop END --stop \n --stop-token-id 5 --time-limit 2.5 --ignore-eos"
    call("generate", "Hello", *flags.split(" "))
    request = script.requests[-1]
    sampling = inference_pb2.SamplingOptions(
        temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, seed=3,
        repetition_penalty=1.5, presence_penalty=-1, frequency_penalty=2, logit_bias={5: 1.5, 7: -100},
    )  # fmt: skip
    assert request.sampling == sampling
    assert request.stopping == inference_pb2.StoppingOptions(
        max_new_tokens=9,
        min_new_tokens=2,
        stop_sequences=["END", "\n"],
        stop_token_ids=[5],
        time_limit=2.5,
        ignore_eos=True,
    )
    assert request.response == inference_pb2.ResponseOptions(logprobs=True, top_logprobs=3, echo=True)


@pytest.mark.parametrize("bias", ["5", "x=1", "5=much", "=", ""])
def test_a_bias_that_is_none(call: Invoke, script: Script, bias: str) -> None:
    result = call("generate", "Hello", "--logit-bias", bias)
    assert result.exit_code == 2
    assert "--logit-bias" in result.stderr
    assert script.requests == []


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
def test_logprobs_are_printed_after_the_answer(call: Invoke, how: str) -> None:
    shown = call("generate", "Hello", "--logprobs", how).stdout.splitlines()
    assert shown == ["one two three", "            'H'", "   -0.2500  'one'\t'two' -0.1250"]


def test_flags_left_out_stay_unset(call: Invoke, script: Script) -> None:
    call("generate", "Hello")
    request = script.requests[-1]
    assert not request.sampling.ListFields()
    assert not request.stopping.ListFields()
    assert not request.response.ListFields()


def test_prompt_from_standard_input(call: Invoke, script: Script) -> None:
    call("generate", "-", "--raw", input="from a pipe\n")
    assert script.requests[-1].prompt == "from a pipe\n"


def test_json(call: Invoke) -> None:
    answer = json.loads(call("generate", "Hello", "--json").stdout)
    assert (answer["text"], answer["token_ids"]) == ("one two three", [10, 11, 12])
    assert (answer["finish_reason"], answer["usage"]["completion_tokens"]) == ("STOP", 3)


def test_json_stream_is_a_line_for_each_chunk(call: Invoke) -> None:
    chunks = [
        json.loads(line) for line in call("generate", "Hello", "--json", "--stream").stdout.splitlines()
    ]
    assert [chunk["text"] for chunk in chunks] == ["one ", "two ", "three", ""]
    assert chunks[-1]["generation"]["text"] == "one two three"


def test_server_from_the_environment(invoke: Invoke, server) -> None:
    result = invoke("generate", "Hello", env={"POLYGRAFT_SERVER": server.address})
    assert result.stdout == "one two three\n"
