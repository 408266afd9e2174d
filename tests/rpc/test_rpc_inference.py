from __future__ import annotations

import asyncio

import grpc
import pytest

import polygraft
from polygraft_api.v1 import inference_pb2 as pb
from polygraft_types.requests import AdapterRef
from tests.rpc.conftest import Serve, Served, details_of
from tests.rpc.fake_engine import MODEL, FakeEngine


def ask(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="hi", **fields)  # type: ignore[arg-type]


async def test_generate(served: Served) -> None:
    answer = await served.inference.Generate(ask(adapter="json", sampling={"seed": 5}))
    assert answer.text == "Hello world"
    assert not answer.token_ids
    summary = answer.summary
    assert summary.finish_reason == pb.FINISH_REASON_STOP_SEQUENCE
    assert summary.usage == pb.Usage(prompt_tokens=3, cached_tokens=1, virtual_tokens=2, completion_tokens=4)
    assert summary.timings == pb.Timings(queue=0.1, prefill=0.2, time_to_first_token=0.3, total=0.4)
    assert (summary.adapter_generation, summary.lora_path) == (7, pb.LORA_PATH_UNMERGED)
    assert (summary.seed, summary.stop_sequence, summary.preemptions) == (5, "###", 1)
    assert not summary.HasField("stop_token_id")
    assert summary.request_id
    (request,) = served.engine.requests
    assert request.adapters == (AdapterRef("json"),)
    assert request.id.startswith(summary.request_id)


async def test_a_stream_ends_with_what_the_unary_call_returns(served: Served) -> None:
    request = ask(sampling={"seed": 5}, response={"token_ids": True})
    chunks = [chunk async for chunk in served.inference.GenerateStream(request)]
    assert [chunk.text for chunk in chunks] == ["Hel", "", "lo ", "world"]
    assert [list(chunk.token_ids) for chunk in chunks] == [[100], [101], [102], [103]]
    assert [chunk.HasField("final") for chunk in chunks] == [False, False, False, True]
    unary = await served.inference.Generate(request)
    unary.summary.request_id = chunks[-1].final.summary.request_id
    assert chunks[-1].final == unary
    assert list(unary.token_ids) == [100, 101, 102, 103]


async def test_a_chunk_without_news_is_not_sent(served: Served) -> None:
    chunks = [chunk async for chunk in served.inference.GenerateStream(ask())]
    assert [chunk.text for chunk in chunks] == ["Hel", "lo ", "world"]
    assert not chunks[-1].token_ids
    assert not chunks[-1].final.token_ids


@pytest.mark.parametrize(
    ("method", "how"),
    [(method, how) for method in ("Generate", "GenerateStream") for how in ("cancel", "deadline", "drop")],
)
async def test_a_call_that_is_given_up_frees_the_engine(served: Served, method: str, how: str) -> None:
    served.engine.pause_after = 1
    deadline = 1.0 if how == "deadline" else None
    call = getattr(served.inference, method)(ask(), timeout=deadline)
    if method == "GenerateStream":
        assert (await call.read()).text == "Hel"
    await served.engine.paused.wait()
    if how == "cancel":
        call.cancel()
    elif how == "drop":
        await served.channel.close()
    await served.engine.dropped.wait()
    assert not served.engine.running
    assert await served.server.calls.wait_idle(5)
    code = "DEADLINE_EXCEEDED" if how == "deadline" else "CANCELLED"
    path = f"/polygraft.v1.InferenceService/{method}"
    assert (
        served.metrics.registry.get_sample_value("polygraft_errors_total", {"method": path, "code": code})
        == 1
    )


async def test_others_go_on_when_one_gives_up(served: Served) -> None:
    served.engine.pause_after = 1
    first = served.inference.GenerateStream(ask())
    second = asyncio.ensure_future(served.inference.Generate(ask()))
    await first.read()
    first.cancel()
    await served.engine.dropped.wait()
    served.engine.resume.set()
    assert (await second).text == "Hello world"
    assert len(served.engine.aborted) == 1


async def test_tokenize_and_detokenize(served: Served) -> None:
    tokens = await served.inference.Tokenize(pb.TokenizeRequest(prompt="abc"))
    assert list(tokens.token_ids) == [97, 98, 99]
    text = await served.inference.Detokenize(pb.DetokenizeRequest(token_ids=[97, 98]))
    assert text.text == "ab"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.inference.Detokenize(pb.DetokenizeRequest(token_ids=[1000]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_get_model(served: Served) -> None:
    model = await served.inference.GetModel(pb.GetModelRequest())
    assert (model.model, model.context_length, model.vocabulary_size) == ("fake", 128, 1000)
    assert list(model.eos_token_ids) == [0]
    assert model.default_sampling == pb.SamplingOptions(
        temperature=0.5,
        top_p=0.9,
        top_k=20,
        min_p=0.1,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
    )
    assert model.has_chat_template
    assert model.server_version == polygraft.__version__
    assert list(model.notes) == list(MODEL.notes)


async def test_get_model_with_an_adapter(served: Served) -> None:
    model = await served.inference.GetModel(pb.GetModelRequest(adapter="json"))
    assert served.engine.asked_for == (AdapterRef("json"),)
    assert (list(model.eos_token_ids), model.has_chat_template) == ([0, 7], False)
    both = [pb.AdapterRef(name="shout"), pb.AdapterRef(name="json", weight=0.5)]
    model = await served.inference.GetModel(pb.GetModelRequest(adapters=both))
    assert served.engine.asked_for == (AdapterRef("shout"), AdapterRef("json", weight=0.5))
    with pytest.raises(grpc.aio.AioRpcError, match="must be empty where adapter is set") as caught:
        await served.inference.GetModel(pb.GetModelRequest(adapter="json", adapters=both))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


LOGPROB = pb.TokenLogprob(
    token_id=5,
    text="five",
    logprob=-0.25,
    top=[pb.TopLogprob(token_id=6, text="six", logprob=-0.125)],
)


async def test_logprobs_and_echo(served: Served) -> None:
    request = ask(response={"token_ids": True, "top_logprobs": 1, "echo": True})
    chunks = [chunk async for chunk in served.inference.GenerateStream(request)]
    assert [chunk.text for chunk in chunks] == ["<Hel", "", "lo ", "world"]
    assert list(chunks[0].token_ids) == [1, 100]
    first = chunks[0].logprobs
    assert (first[0].token_id, first[0].HasField("logprob")) == (1, False)
    assert [list(chunk.logprobs) for chunk in chunks[1:]] == [[LOGPROB]] * 3
    final = chunks[-1].final
    assert final.text == "<Hello world"
    assert list(final.token_ids) == [1, 100, 101, 102, 103]
    assert list(final.logprobs) == [first[0], *[LOGPROB] * 4]
    unary = await served.inference.Generate(request)
    assert (unary.text, unary.logprobs) == (final.text, final.logprobs)


async def test_what_is_not_asked_for_is_not_sent(served: Served) -> None:
    chunks = [chunk async for chunk in served.inference.GenerateStream(ask(response={"echo": True}))]
    assert chunks[-1].final.text == "<Hello world"
    assert not chunks[-1].final.token_ids
    assert not chunks[-1].final.logprobs


async def test_score(served: Served) -> None:
    request = pb.ScoreRequest(prompt="a", continuations=["b", "c"], adapter="json", top_logprobs=1)
    answer = await served.inference.Score(request)
    assert [score.log_likelihood for score in answer.scores] == [-0.5, -1.5]
    assert [score.is_greedy for score in answer.scores] == [True, False]
    assert list(answer.scores[0].tokens) == [LOGPROB]
    assert answer.usage == pb.Usage(prompt_tokens=6, cached_tokens=1, virtual_tokens=2, completion_tokens=2)
    assert answer.timings == pb.Timings(queue=0.1, prefill=0.2, time_to_first_token=0.3, total=0.4)
    assert (answer.adapter_generation, answer.lora_path) == (7, pb.LORA_PATH_UNMERGED)
    assert answer.request_id
    (asked,) = served.engine.scores
    assert (asked.prompt, asked.continuations, asked.top_logprobs) == ("a", ("b", "c"), 1)
    assert asked.adapters == (AdapterRef("json"),)


@pytest.mark.parametrize("how", ["cancel", "deadline", "drop"])
async def test_a_score_that_is_given_up_frees_the_engine(served: Served, how: str) -> None:
    served.engine.pause_after = 0
    deadline = 1.0 if how == "deadline" else None
    call = served.inference.Score(pb.ScoreRequest(prompt="a", continuations=["b"]), timeout=deadline)
    await served.engine.paused.wait()
    if how == "cancel":
        call.cancel()
    elif how == "drop":
        await served.channel.close()
    await served.engine.dropped.wait()
    assert not served.engine.running
    assert await served.server.calls.wait_idle(5)


async def test_a_score_that_is_refused_names_the_field(served: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.inference.Score(pb.ScoreRequest(prompt="a"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details_of(caught.value)["BadRequest"].field_violations[0].field == "continuations"
    assert not served.engine.scores


async def test_an_answer_as_large_as_the_limit_arrives_and_a_larger_one_is_an_error(
    serve_with: Serve,
) -> None:
    engine = FakeEngine()
    async with serve_with(engine, max_message_bytes=64 * 1024) as served:
        engine.answer = ("x" * 60_000,)
        assert len((await served.inference.Generate(ask())).text) == 60_000
        engine.answer = ("x" * 70_000,)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.inference.Generate(ask())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_message_beyond_the_limit_is_refused_and_others_go_on(serve_with: Serve) -> None:
    async with serve_with(max_message_bytes=64 * 1024) as served:
        await served.inference.Generate(pb.GenerateRequest(prompt="x" * 60_000))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.inference.Generate(pb.GenerateRequest(prompt="x" * 70_000))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await served.inference.Generate(ask())).text == "Hello world"
        assert len(served.engine.requests) == 2


async def test_several_adapters_are_all_named_in_the_end(served: Served) -> None:
    both = [pb.AdapterRef(name="json", generation=3), pb.AdapterRef(name="shout", weight=0.5)]
    answer = await served.inference.Generate(ask(adapters=both))
    expected = (AdapterRef("json", generation=3), AdapterRef("shout", weight=0.5))
    assert served.engine.requests[-1].adapters == expected
    assert (answer.summary.adapter_generation, list(answer.summary.adapter_generations)) == (7, [7, 8])
    score = await served.inference.Score(pb.ScoreRequest(prompt="a", continuations=["b"], adapters=both))
    assert served.engine.scores[-1].adapters == expected
    assert (score.adapter_generation, list(score.adapter_generations)) == (7, [7, 8])
    base = await served.inference.Generate(ask())
    assert (base.summary.adapter_generation, list(base.summary.adapter_generations)) == (0, [])


async def test_tokens_in_an_adapters_own_way(served: Served) -> None:
    await served.inference.Tokenize(pb.TokenizeRequest(prompt="hi", adapter="json"))
    assert served.engine.asked_for == (AdapterRef("json"),)
    await served.inference.Detokenize(pb.DetokenizeRequest(token_ids=[104]))
    assert served.engine.asked_for == ()
    await served.inference.Detokenize(pb.DetokenizeRequest(token_ids=[104], adapter="shout"))
    assert served.engine.asked_for == (AdapterRef("shout"),)
    both = [pb.AdapterRef(name="json", generation=3), pb.AdapterRef(name="shout", weight=0.5)]
    await served.inference.Tokenize(pb.TokenizeRequest(prompt="hi", adapters=both))
    assert served.engine.asked_for == (AdapterRef("json", generation=3), AdapterRef("shout", weight=0.5))
    await served.inference.Detokenize(pb.DetokenizeRequest(token_ids=[104], adapters=both))
    assert served.engine.asked_for == (AdapterRef("json", generation=3), AdapterRef("shout", weight=0.5))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.inference.Tokenize(pb.TokenizeRequest(prompt="hi", adapter="not a name"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
