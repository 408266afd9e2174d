"""`polygraft score` against a scripted server."""

from __future__ import annotations

import json

from polygraft_api.v1 import inference_pb2
from tests.client.scripted import Script

from .conftest import Invoke


def test_prints_a_line_for_each_continuation(call: Invoke, script: Script) -> None:
    result = call("score", "Hello", " a", " b", "--adapter", "mood", "--top-logprobs", "2")
    assert result.exit_code == 0
    token = "   -0.2500  'one'\t'two' -0.1250"
    assert result.stdout.splitlines() == ["     -1.5000 * ' a'", token, "     -2.5000   ' b'", token]
    expected = inference_pb2.ScoreRequest(
        prompt="Hello", continuations=[" a", " b"], adapter="mood", top_logprobs=2
    )
    assert script.requests == [expected]


def test_prints_no_tokens_unless_asked(call: Invoke) -> None:
    assert call("score", "", "a").stdout == "     -1.5000 * 'a'\n"
    assert "'one'" in call("score", "", "a", "--logprobs").stdout


def test_chat_and_json(call: Invoke, script: Script) -> None:
    answer = json.loads(call("score", "Hello", "a", "--chat", "--json").stdout)
    assert answer["continuations"][0]["log_likelihood"] == -1.5
    assert script.requests[0].chat.messages[0].content == "Hello"


def test_a_continuation_is_needed(call: Invoke) -> None:
    assert call("score", "Hello").exit_code == 2
