"""Arguments to requests, responses to models, through a real channel."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from polygraft_api.v1 import adapters_pb2, inference_pb2
from polygraft_client import (
    AdapterRef,
    AdapterState,
    AsyncClient,
    ChatMessage,
    Client,
    CombinationType,
    ContinuationScore,
    FinishReason,
    Health,
    InvalidRequest,
    LoraPath,
    NearestToken,
    NotFound,
    TokenLogprob,
    TopLogprob,
)

from .scripted import INFERENCE, Script, ScriptedServer, adapter


@pytest.fixture
def client(server: ScriptedServer):
    with Client(server.address) as client:
        yield client


def test_every_option_reaches_the_server(client: Client, script: Script) -> None:
    client.generate(
        "Hello",
        adapter="headline",
        lora_path=LoraPath.UNMERGED,
        temperature=0.5,
        top_p=0.9,
        top_k=0,
        min_p=0.1,
        seed=2**63 - 1,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={5: 1.5, 7: -100},
        max_new_tokens=9,
        min_new_tokens=2,
        stop="END",
        stop_token_ids=[5],
        ignore_eos=True,
        time_limit=3.5,
        return_token_ids=True,
        logprobs=True,
        top_logprobs=3,
        echo=True,
        timeout=10,
    )
    assert script.requests == [
        inference_pb2.GenerateRequest(
            prompt="Hello",
            adapter="headline",
            lora_path=inference_pb2.LORA_PATH_UNMERGED,
            sampling=inference_pb2.SamplingOptions(
                temperature=0.5,
                top_p=0.9,
                top_k=0,
                min_p=0.1,
                seed=2**63 - 1,
                repetition_penalty=1.1,
                presence_penalty=0.5,
                frequency_penalty=-0.5,
                logit_bias={5: 1.5, 7: -100},
            ),
            stopping=inference_pb2.StoppingOptions(
                max_new_tokens=9,
                min_new_tokens=2,
                stop_sequences=["END"],
                stop_token_ids=[5],
                ignore_eos=True,
                time_limit=3.5,
            ),
            response=inference_pb2.ResponseOptions(token_ids=True, logprobs=True, top_logprobs=3, echo=True),
        )
    ]


def test_what_is_left_out_stays_unset(client: Client, script: Script) -> None:
    client.generate("Hello")
    (request,) = script.requests
    assert not request.sampling.ListFields()
    assert not request.stopping.ListFields()
    assert not request.response.ListFields()
    assert request.lora_path == inference_pb2.LORA_PATH_UNSPECIFIED


def test_answer(client: Client) -> None:
    answer = client.generate(token_ids=[1, 2, 3], adapter="mood", return_token_ids=True)
    assert answer.text == "MOOD one two three"
    assert answer.token_ids == (10, 11, 12)
    assert answer.finish_reason is FinishReason.STOP
    assert (answer.usage.prompt_tokens, answer.usage.virtual_tokens, answer.usage.completion_tokens) == (
        5,
        2,
        3,
    )
    assert (answer.timings.queue, answer.timings.prefill, answer.timings.total) == (0.25, 0.5, 1.5)
    assert (answer.seed, answer.adapter_generation, answer.lora_path) == (7, 3, LoraPath.UNMERGED)
    assert (answer.stop_token_id, answer.stop_sequence, answer.request_id) == (2, "", "r-1")


TOKEN = TokenLogprob(10, "one", -0.25, (TopLogprob(11, "two", -0.125),))


def test_logprobs(client: Client) -> None:
    assert client.generate("Hello", logprobs=True).logprobs == (TokenLogprob(9, "H", None), TOKEN)
    with client.stream("Hello", logprobs=True) as chunks:
        assert [chunk.logprobs for chunk in chunks] == [(TOKEN,)] * 3 + [()]


def test_score(client: Client, script: Script) -> None:
    score = client.score("Hello", [" a", " b"], adapter="mood", lora_path=LoraPath.UNMERGED, top_logprobs=2)
    assert score.continuations == (
        ContinuationScore(-1.5, True, (TOKEN,)),
        ContinuationScore(-2.5, False, (TOKEN,)),
    )
    assert (score.usage.completion_tokens, score.timings.total) == (3, 1.5)
    assert (score.adapter_generation, score.lora_path, score.request_id) == (3, LoraPath.UNMERGED, "r-2")
    assert script.requests == [
        inference_pb2.ScoreRequest(
            prompt="Hello",
            continuations=[" a", " b"],
            adapter="mood",
            lora_path=inference_pb2.LORA_PATH_UNMERGED,
            top_logprobs=2,
        )
    ]


def test_score_of_token_ids_and_of_a_single_text(client: Client, script: Script) -> None:
    client.score(None, [[1, 2], (3,)], token_ids=[4])
    client.score("", "a")
    client.score(None, ["a"], chat=[{"role": "user", "content": "Hi"}])
    ids, single, chat = script.requests
    assert list(ids.token_ids.ids) == [4]
    assert [list(tokens.ids) for tokens in ids.continuation_token_ids] == [[1, 2], [3]]
    assert (single.WhichOneof("input"), list(single.continuations)) == ("prompt", ["a"])
    assert chat.chat.messages[0].content == "Hi"


@pytest.mark.parametrize(
    ("prompt", "continuations", "names"),
    [
        (None, ["a"], "prompt"),
        ("p", [[1], "a"], r"continuations\[1\]"),
        ("p", [[-1]], r"continuations\[0\].ids"),
        ("p", ["bad \ud800"], "continuations"),
    ],
)
def test_scores_that_cannot_be_sent(
    client: Client, script: Script, prompt: str | None, continuations: list, names: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"^{names}: "):
        client.score(prompt, continuations)
    assert script.requests == []


def test_chat_as_dicts_or_messages(client: Client, script: Script) -> None:
    turns = [{"role": "system", "content": "Be brief."}, ChatMessage("user", "Hi")]
    client.generate(chat=turns)
    messages = [(m.role, m.content) for m in script.requests[0].chat.messages]
    assert messages == [("system", "Be brief."), ("user", "Hi")]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "chat": []}, "chat"),
        ({"prompt": b"\xff"}, "prompt"),
        ({"prompt": "a", "top_k": -1}, "top_k"),
        ({"prompt": "a", "seed": 2**64}, "seed"),
        ({"prompt": "a", "stop_token_ids": ["x"]}, "stop_token_ids"),
        ({"token_ids": [-1]}, "token_ids"),
        ({"chat": [{"role": "user"}]}, r"chat\[0\]"),
        ({"chat": ["hello"]}, r"chat\[0\]"),
        ({"chat": [{"role": "user", "content": 3}]}, r"chat\[0\].content"),
        ({"prompt": "bad \ud800"}, "prompt"),
        ({"prompt": "a", "lora_path": LoraPath.UNKNOWN}, "lora_path"),
        ({"prompt": "a", "lora_path": "sideways"}, "lora_path"),
        ({"prompt": "a", "combination_type": "cat"}, "combination_type"),
        ({"prompt": "a", "adapter": 3}, "adapter"),
        ({"prompt": "a", "adapters": "mood"}, "adapters"),
        ({"prompt": "a", "adapters": ["mood", 3]}, r"adapters\[1\]"),
        ({"prompt": "a", "adapters": [("mood", 0.5, 1)]}, r"adapters\[0\]"),
        ({"prompt": "a", "adapters": [("mood", "much")]}, r"adapters\[0\].weight"),
        ({"prompt": "a", "adapters": [AdapterRef("mood", generation=-1)]}, r"adapters\[0\].generation"),
        ({"prompt": "a", "logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"prompt": "a", "top_logprobs": -1}, "top_logprobs"),
        ({"prompt": "a", "presence_penalty": "much"}, "presence_penalty"),
    ],
)
def test_what_cannot_be_sent_is_named(client: Client, script: Script, arguments: dict, names: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{names}: "):
        client.generate(**arguments)
    assert script.requests == []


def test_several_adapters_reach_the_server(client: Client, script: Script) -> None:
    given = ["mood", ("headline", 0.5), AdapterRef("other", generation=4), AdapterRef("last", -1.0)]
    sent = [
        inference_pb2.AdapterRef(name="mood"),
        inference_pb2.AdapterRef(name="headline", weight=0.5),
        inference_pb2.AdapterRef(name="other", generation=4),
        inference_pb2.AdapterRef(name="last", weight=-1.0),
    ]
    answer = client.generate("a", adapters=given)
    client.score("a", ["b"], adapters=given)
    client.tokenize("a", adapters=given)
    client.detokenize([97], adapters=given)
    assert [list(request.adapters) for request in script.requests] == [sent] * 4
    assert all(request.adapter == "" for request in script.requests)
    assert answer.adapter_generations == (3, 4, 5, 6)


def test_the_combination_type_reaches_the_server(client: Client, script: Script) -> None:
    for asked in (CombinationType.LINEAR, CombinationType.STACK):
        client.generate("a", adapters=["mood", "headline"], combination_type=asked)
        client.score("a", ["b"], adapters=["mood", "headline"], combination_type=asked)
    client.generate("a", adapters=["mood", "headline"])
    linear, stack = inference_pb2.COMBINATION_TYPE_LINEAR, inference_pb2.COMBINATION_TYPE_STACK
    assert [request.combination_type for request in script.requests] == [linear, linear, stack, stack, 0]


def test_unknown_options_are_refused(client: Client) -> None:
    with pytest.raises(TypeError, match="temprature"):
        client.generate("Hello", temprature=1.0)  # type: ignore[call-arg]


def test_tokenize_and_back(client: Client) -> None:
    assert client.detokenize(client.tokenize("Grüße")) == "Grüße"
    assert client.tokenize(chat=[{"role": "user", "content": "a"}]) == (97,)


def test_model(client: Client) -> None:
    model = client.model()
    assert (model.architecture, model.weight_bytes, model.eos_token_ids) == ("llama", 269_030_016, (2,))
    assert (model.default_sampling.temperature, model.default_sampling.top_k) == (0.0, None)
    assert (model.default_sampling.repetition_penalty, model.default_sampling.presence_penalty) == (1.1, None)
    assert model.notes == ("a note",)


def test_model_with_an_adapter(client: Client, script: Script) -> None:
    script.has_chat_template, script.with_template = False, {"mood"}
    assert not client.model().has_chat_template
    assert client.model(adapter="mood").has_chat_template
    assert client.model(adapters=["headline", AdapterRef("mood", 0.5)]).has_chat_template
    assert not client.model(adapter="headline").has_chat_template
    with pytest.raises(InvalidRequest):
        client.model(adapters="mood")


def test_health(client: Client, script: Script) -> None:
    assert client.health() is Health.SERVING
    assert client.health(INFERENCE) is Health.NOT_SERVING
    with pytest.raises(NotFound):
        client.health("no.such.Service")


def test_token_goes_along(server: ScriptedServer) -> None:
    with Client(server.address, token="secret") as client:
        client.model()
        assert "secret" not in repr(vars(client))
    assert server.script.metadata["authorization"] == "Bearer secret"


def test_adapters(client: Client, script: Script) -> None:
    loaded = client.adapters.load("new", "folder/new")
    assert (loaded.name, loaded.source, loaded.state) == ("new", "folder/new", AdapterState.READY)
    assert loaded.load_time == datetime.fromtimestamp(1_700_000_000, UTC)
    assert client.adapters.reload("new").generation == 4
    client.adapters.unload("new")
    client.adapters.unload("new", wait=False)
    modes = [request.mode for request in script.requests[-2:]]
    assert modes == [adapters_pb2.UNLOAD_MODE_WAIT, adapters_pb2.UNLOAD_MODE_REFUSE]


def test_adapter_with_nearest_tokens(client: Client, script: Script) -> None:
    near = adapters_pb2.NearestToken(token_id=4, text=" joy", similarity=0.5)
    script.nearest = [adapters_pb2.NearestTokens(tokens=[near])]
    assert client.adapters.get("mood").nearest_tokens == ()
    shown = client.adapters.get("mood", nearest_tokens=1)
    assert shown.nearest_tokens == ((NearestToken(4, " joy", 0.5),),)
    assert (shown.kind, shown.rank, shown.disk_bytes) == ("lora", 8, 1_850_000)


def test_listing_fetches_all_pages(client: Client, script: Script) -> None:
    script.adapters = [adapter(f"a{i}") for i in range(5)]
    script.page_size = 2
    assert [a.name for a in client.adapters.list()] == ["a0", "a1", "a2", "a3", "a4"]
    assert [r.page_token for r in script.requests] == ["", "2", "4"]
    assert len(list(client.adapters.list(page_size=5))) == 5


def test_values_of_a_newer_server(client: Client, script: Script) -> None:
    script.adapters = [adapter("later", state=17)]
    assert client.adapters.get("later").state is AdapterState.UNKNOWN


async def test_async_client_is_the_same(server: ScriptedServer, client: Client) -> None:
    async with AsyncClient(server.address) as other:
        asked = {"adapter": "mood", "return_token_ids": True}
        assert await other.generate("Hello", **asked) == client.generate("Hello", **asked)
        assert await other.score("Hello", ["a", "b"]) == client.score("Hello", ["a", "b"])
        assert await other.model() == client.model()
        assert await other.health() is Health.SERVING
        assert await other.detokenize(await other.tokenize("abc")) == "abc"
        assert [a async for a in other.adapters.list(page_size=1)] == list(client.adapters.list())
        assert await other.adapters.get("mood") == client.adapters.get("mood")
        assert await other.adapters.load("new") == client.adapters.load("new")
        assert await other.adapters.reload("new") == client.adapters.reload("new")
        assert await other.adapters.unload("new") == client.adapters.unload("new")
