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


def test_flags_reach_the_server(call: Invoke, script: Script) -> None:
    flags = "--temperature 0.5 --top-p 0.9 --top-k 40 --min-p 0.1 --seed 3 --max-new-tokens 9"
    flags += " --min-new-tokens 2 --stop END --stop \n --stop-token-id 5 --time-limit 2.5 --ignore-eos"
    call("generate", "Hello", *flags.split(" "))
    request = script.requests[-1]
    sampling = inference_pb2.SamplingOptions(temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, seed=3)
    assert request.sampling == sampling
    assert request.stopping == inference_pb2.StoppingOptions(
        max_new_tokens=9,
        min_new_tokens=2,
        stop_sequences=["END", "\n"],
        stop_token_ids=[5],
        time_limit=2.5,
        ignore_eos=True,
    )


def test_flags_left_out_stay_unset(call: Invoke, script: Script) -> None:
    call("generate", "Hello")
    request = script.requests[-1]
    assert not request.sampling.ListFields()
    assert not request.stopping.ListFields()


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
