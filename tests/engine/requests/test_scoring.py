"""Scores of continuations are PEFT's, alone, mixed, in chunks and preempted; whoever ends early holds nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from polygraft.core.output import RequestOutput
from polygraft.engine.async_engine import AsyncEngine
from polygraft.engine.cache import prefix_cache
from polygraft.engine.engine import Engine
from polygraft.engine.requests.scoring import ScoreJob
from polygraft.errors import (
    AdapterNotFound,
    ContextLengthExceeded,
    Draining,
    InvalidRequest,
    ResourceExhausted,
)
from polygraft.telemetry.metrics import Metrics
from polygraft_types.answers import ContinuationScore, FinishReason
from polygraft_types.requests import AdapterRef, Chat, ChatMessage, LoraPath, ScoreRequest
from tests.engine.asking import PROMPT, check_clean, tokens_of
from tests.engine.stores import copy_of, poison
from tests.engines import greedy, make_engine, run_greedy
from tests.equivalence.reference import load_reference, task_of
from tests.peft_folders import COMMON
from tests.tiny import EOS, byte_tokenizer

TOLERANCE = 2e-4  # on a token
CONTINUATIONS = ((5,), (7, 8, 9, 200, 11, 12), tuple(range(40, 61)), (7, 8))
FAST = byte_tokenizer()


def ids(text: str) -> list[int]:
    return FAST(text, add_special_tokens=False)["input_ids"]


def ask(
    id: str = "s",
    adapter: str | None = None,
    prompt: str | Sequence[int] | Chat = PROMPT,
    continuations: Sequence[str | tuple[int, ...]] = CONTINUATIONS,
    top: int = 0,
) -> ScoreRequest:
    return ScoreRequest(
        id,
        prompt if isinstance(prompt, str | Chat) else tuple(prompt),
        tuple(continuations),
        () if adapter is None else (AdapterRef(adapter),),
        top_logprobs=top,
    )


def scores_of(outputs: Sequence[RequestOutput]) -> tuple[ContinuationScore, ...]:
    [output] = outputs
    assert output.finished is not None, output.error
    assert output.finished.reason is FinishReason.SCORED
    return output.scores


def by_peft(
    model: Path, store: Path, adapter: str | None, pairs: Sequence[tuple[list[int], tuple[int, ...]]]
) -> list[tuple[list[float], bool]]:
    """Each token's log-probability, and whether greedy decoding would have given them all."""
    reference = load_reference(model, None if adapter is None else store / adapter, "float32")
    found = []
    for prompt, continuation in pairs:
        whole = torch.tensor([[*prompt, *continuation]])
        with torch.inference_mode():
            logits = reference(input_ids=whole, **task_of(reference)).logits[0, -len(continuation) - 1 : -1]
        tokens = torch.tensor(continuation)
        values = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0].tolist()
        found.append((values, bool((logits.argmax(-1) == tokens).all())))
    return found


def check(got: Sequence[ContinuationScore], expected: Sequence[tuple[list[float], bool]]) -> None:
    assert len(got) == len(expected)
    for score, (values, is_greedy) in zip(got, expected, strict=True):
        assert [token.logprob for token in score.tokens] == pytest.approx(values, abs=TOLERANCE)
        assert score.log_likelihood == pytest.approx(sum(values), abs=TOLERANCE * len(values))
        assert score.is_greedy is is_greedy


@pytest.mark.parametrize("adapter", [None, *COMMON])
def test_scores_are_pefts_alone_and_mixed(
    engine: Engine, llama: Path, llama_store: Path, adapter: str | None
) -> None:
    likeliest = tuple(run_greedy(engine, [greedy("g", PROMPT, adapter, 6)])[0])
    continuations = (*CONTINUATIONS, likeliest)
    expected = by_peft(llama, llama_store, adapter, [(PROMPT, c) for c in continuations])
    assert [is_greedy for _, is_greedy in expected] == [False] * 4 + [True]
    request = ask("s", adapter, continuations=continuations)
    check(scores_of(engine.generate([request])[0]), expected)
    neighbours = [greedy("g", PROMPT, None, 9), ask("other", "lora"), greedy("h", PROMPT[:5], "prefix", 9)]
    mixed = engine.generate([neighbours[0], request, *neighbours[1:]])
    check(scores_of(mixed[1]), expected)
    assert [tokens_of(mixed[0])] == run_greedy(engine, [greedy("g", PROMPT, None, 9)])


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("budget", [512, 5])
def test_chunks_the_cache_and_preemption_change_nothing(
    llama: Path, llama_store: Path, tmp_path: Path, caching: bool, budget: int
) -> None:
    store = copy_of(llama_store, tmp_path / "s", "lora", "prompt")
    engine = make_engine(
        llama, store, kv_cache_bytes=9 * 12_288, max_num_batched_tokens=budget, max_num_seqs=5,
        prefix_caching=caching,
    )  # fmt: skip
    names = [None, "lora", "prompt"]
    requests = [ask(f"{n}", n) for n in names]
    outputs = engine.generate([*requests, greedy("g", PROMPT, None, 30)])
    for name, output in zip(names, outputs, strict=False):
        check(scores_of(output), by_peft(llama, store, name, [(PROMPT, c) for c in CONTINUATIONS]))
    check_clean(engine)


def test_preemption_in_the_middle_starts_it_anew(llama: Path) -> None:
    engine = make_engine(llama, max_num_batched_tokens=12, max_num_seqs=3)
    expected = scores_of(engine.generate([ask(continuations=[tuple(range(40, 90))])])[0])
    engine.submit(ask(continuations=[tuple(range(40, 90))]))
    for _ in range(4):
        engine.step()
    [sequence] = engine.scheduler.running
    # As the scheduler does it when blocks run out.
    engine.scheduler.running.remove(sequence)
    engine.scheduler._free(sequence)
    sequence.on_preempted()
    engine.scheduler.waiting.append(sequence)
    outputs: list[RequestOutput] = []
    while engine.has_work:
        outputs += engine.step().outputs
    got = scores_of(outputs)
    assert len(got[0].tokens) == 50
    assert got[0].log_likelihood == pytest.approx(expected[0].log_likelihood, abs=1e-3)
    check_clean(engine)


def test_the_prompt_is_computed_once(llama: Path) -> None:
    prompt = list(range(40, 140))
    rows = {}
    for caching in (True, False):
        engine = make_engine(llama, prefix_caching=caching)
        engine.submit(ask(prompt=prompt, continuations=[(1,), (2,), (3,)]))
        rows[caching] = 0
        outputs: list[RequestOutput] = []
        while engine.has_work:
            result = engine.step()
            outputs += result.outputs
            rows[caching] += result.stats.prefill_rows if result.stats else 0
        finished = outputs[-1].finished
        assert finished is not None
        assert finished.usage.cached_tokens == (2 * 96 if caching else 0)
        assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (300, 3)
        check_clean(engine)
    assert rows == {True: 100 + 2 * 4, False: 300}


def test_the_keys_of_a_long_prompt_are_computed_once(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digested: list[bytes] = []
    digest = prefix_cache._digest
    monkeypatch.setattr(prefix_cache, "_digest", lambda data: digested.append(data) or digest(data))
    engine = make_engine(llama)
    digested.clear()
    ending_alike = [(1, 2, 3), (1, 2), (4,)]
    engine.generate([ask(prompt=list(range(40, 200)), continuations=ending_alike)])
    # Ten full blocks, and what stands for the weights.
    assert len(digested) == 10 + 1
    check_clean(engine)


def test_the_likeliest_and_the_texts(engine: Engine) -> None:
    [score] = scores_of(engine.generate([ask(prompt="ab", continuations=["cé"], top=2)])[0])
    assert [token.text for token in score.tokens] == ["c", "\ufffd", "\ufffd"]
    assert all(len(token.top) == 2 for token in score.tokens)
    assert all(token.top[0].logprob >= (token.logprob or 0) for token in score.tokens)


# ---- which tokens ----------------------------------------------------------------------------------------


def test_spaces_at_the_prompts_end_go_to_the_continuations(engine: Engine) -> None:
    pairs = engine.prompts.base.pairs("ab  ", ["c", (9,)])
    assert [(list(c), list(t)) for c, t in pairs] == [(ids("ab"), ids("  c")), (ids("ab"), [9])]


def test_token_ids_follow_the_prompt_as_it_is(engine: Engine) -> None:
    [(context, tokens)] = engine.prompts.base.pairs("ab  ", [(9, 10)])
    assert (list(context), list(tokens)) == (ids("ab  "), [9, 10])
    [(context, tokens)] = engine.prompts.base.pairs((4, 5), ["xy"])
    assert (list(context), list(tokens)) == ([4, 5], ids("xy"))


def test_a_chat_keeps_its_templates_end(engine: Engine) -> None:
    [(context, tokens)] = engine.prompts.base.pairs(Chat((ChatMessage("user", "a"),)), [" b"])
    assert (list(context), list(tokens)) == (ids("[user]a\n[assistant]"), ids(" b"))


@pytest.mark.parametrize(("prompt", "expected"), [("", "xy"), (" ", " xy")])
def test_an_empty_prompt_is_a_beginning(engine: Engine, prompt: str, expected: str) -> None:
    [(context, tokens)] = engine.prompts.base.pairs(prompt, ["xy"])
    assert (list(context), list(tokens)) == ([EOS], ids(expected))
    [(context, tokens)] = engine.prompts.base.pairs("", [(3,)])
    assert (list(context), list(tokens)) == ([EOS], [3])


# ---- what is refused, and how it ends --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "error", "field"),
    [
        (ask(prompt=[1] * 200, continuations=[(1,) * 10, (1,) * 58]), ContextLengthExceeded, "continuations[1]"),
        (ask(adapter="p-tuning", continuations=[(1,) * 220]), ContextLengthExceeded, "continuations[0]"),
        (ask(prompt="x" * 300, continuations=["y"]), ContextLengthExceeded, "prompt"),
        (ask(continuations=[(1,), (288,)]), InvalidRequest, "continuation_token_ids[1].ids[0]"),
        (ask(prompt=[288]), InvalidRequest, "token_ids.ids[0]"),
        (ask(prompt="ab", continuations=[""]), InvalidRequest, "continuations[0]"),
        (ScoreRequest("m", "a", ("b",), None, LoraPath.MERGED, True), InvalidRequest, "lora_path"),
    ],
)  # fmt: skip
def test_what_is_refused_holds_nothing(
    engine: Engine, request_: ScoreRequest, error: type[Exception], field: str
) -> None:
    with pytest.raises(error) as caught:
        engine.submit(request_)
    assert caught.value.field == field  # type: ignore[attr-defined]


def test_what_just_fits(engine: Engine) -> None:
    assert scores_of(engine.generate([ask(prompt=[1] * 200, continuations=[(1,) * 57])])[0])
    with pytest.raises(AdapterNotFound):
        engine.submit(ask(adapter="nobody"))


@pytest.mark.parametrize("adapter", [None, "lora", "p-tuning"])
@pytest.mark.parametrize("steps", range(5))
def test_abort_at_any_time_frees_everything(
    llama: Path, llama_store: Path, steps: int, adapter: str | None
) -> None:
    engine = make_engine(llama, llama_store, max_num_batched_tokens=16, max_num_seqs=3)
    engine.submit(ask("s", adapter))
    ended = [output for _ in range(steps) for output in engine.step().outputs]
    assert ended == []
    [end] = engine.abort("s")
    assert end.finished is not None
    assert (end.finished.reason, end.scores) == (FinishReason.CANCELLED, ())
    assert engine.abort("s") == []
    engine.check_integrity()
    while engine.has_work:
        assert engine.step().outputs == []
    check_clean(engine)


def test_logits_that_are_not_finite_end_it_once(llama: Path, llama_store: Path, tmp_path: Path) -> None:
    engine = make_engine(llama, copy_of(llama_store, tmp_path / "s", "lora"), prefix_caching=False)
    expected = scores_of(engine.generate([ask("good")])[0])
    poison(engine, "lora")
    bad, good = engine.generate([ask("bad", "lora"), ask("good")])
    [end] = bad
    assert "not finite" in str(end.error)
    assert scores_of(good) == expected
    check_clean(engine)


async def test_the_async_engine_scores_aborts_and_counts(llama: Path, llama_store: Path) -> None:
    engine = make_engine(llama, llama_store, max_num_batched_tokens=16, max_num_seqs=3)
    expected = scores_of(engine.generate([ask("s", "lora")])[0])
    metrics = Metrics()
    handle = AsyncEngine(engine, metrics, max_waiting=2)
    handle.start()
    first, second = await asyncio.gather(handle.score(ask("a", "lora")), handle.score(ask("b", "lora")))
    assert [s.is_greedy for s in first.scores] == [s.is_greedy for s in expected]
    assert [s.log_likelihood for s in second.scores] == pytest.approx([s.log_likelihood for s in expected])
    with pytest.raises(InvalidRequest, match="continuations"):
        await handle.score(ask("c", "lora", prompt="a", continuations=[""]))
    task = asyncio.create_task(handle.score(ask("d", "lora", continuations=[(1,) * 200] * 50)))
    while not engine.scheduler.running:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await handle.drain(10.0) == 0
    labels = {"adapter": "lora", "kind": "lora", "path": "UNMERGED"}
    value = metrics.registry.get_sample_value
    assert value("polygraft_requests_total", {**labels, "finish_reason": "SCORED"}) == 2
    assert value("polygraft_requests_total", {**labels, "finish_reason": "CANCELLED"}) == 1
    check_clean(engine)


async def test_who_gives_up_while_it_is_tokenized_pins_no_adapter(
    llama: Path, llama_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llama, llama_store)
    tokenized, given_up = threading.Event(), threading.Event()
    prepare = engine.intake.prepare_score

    def prepare_until_given_up(request: ScoreRequest) -> ScoreJob:
        job = prepare(request)
        tokenized.set()
        assert given_up.wait(20)
        return job

    def pins() -> int:
        return sum(info.running_requests for info in engine.adapters.registry.list())

    monkeypatch.setattr(engine.intake, "prepare_score", prepare_until_given_up)
    handle = AsyncEngine(engine, Metrics(), max_waiting=2)
    handle.start()
    task = asyncio.create_task(handle.score(ask("a", "lora", prompt="ab " * 60, continuations=["c"] * 200)))
    assert await asyncio.to_thread(tokenized.wait, 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pins() == 1
    given_up.set()
    async with asyncio.timeout(20):
        while pins():
            await asyncio.sleep(0.01)
    assert await handle.drain(10.0) == 0
    check_clean(engine)


async def test_who_is_tokenized_while_it_drains_is_refused(llama: Path, llama_store: Path) -> None:
    engine = make_engine(llama, llama_store)
    handle = AsyncEngine(engine, Metrics(), max_waiting=2)
    handle.start()
    task = asyncio.create_task(handle.score(ask("a", "lora", prompt="ab " * 60, continuations=["c"] * 200)))
    await asyncio.sleep(0)
    assert await handle.drain(10.0) == 0
    with pytest.raises(Draining):
        await asyncio.wait_for(task, 20)
    await asyncio.sleep(0)
    check_clean(engine)


async def test_the_queues_limit_counts_scores(llama: Path) -> None:
    engine = make_engine(llama)
    handle = AsyncEngine(engine, Metrics(), max_waiting=1)
    first = asyncio.create_task(handle.score(ask("first")))
    while not handle._streams:
        await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted):
        await handle.score(ask("late"))
    handle.start()
    assert (await first).scores
    await handle.drain(10.0)
    check_clean(engine)


def test_merged_scores_are_the_unmerged_ones_and_say_so(engine: Engine) -> None:
    def scored(id: str, path: LoraPath) -> tuple[list[float], LoraPath]:
        request = ScoreRequest(
            id, "ab", ("c", "de", "fgh"), (AdapterRef("lora"),), path, path is LoraPath.MERGED
        )
        [[output]] = engine.generate([request])
        assert output.finished is not None, output.error
        return [score.log_likelihood for score in output.scores], output.finished.path

    unmerged, path = scored("u", LoraPath.UNMERGED)
    assert path is LoraPath.UNMERGED
    merged, path = scored("m", LoraPath.MERGED)
    assert path is LoraPath.MERGED
    assert merged == pytest.approx(unmerged, abs=1e-4)
    assert scored("a", LoraPath.AUTO) == (unmerged, LoraPath.UNMERGED)
    engine.finish_background()
    engine.check_integrity()


def test_scores_whose_copy_cant_be_made_end_with_an_error(
    llama: Path, llama_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llama, llama_store)
    [site, *_] = engine.runner._bank.modules.merge_sites(engine.adapters.registry.current("lora").slot)

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(site, "merge", fail)
    [[output]] = engine.generate(
        [ScoreRequest("m", "ab", ("c", "de"), (AdapterRef("lora"),), LoraPath.MERGED, True)]
    )
    assert isinstance(output.error, ResourceExhausted)
    engine.finish_background()
    engine.check_integrity()
