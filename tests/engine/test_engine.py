"""What becomes of a request: how it ends, what it holds meanwhile, and that its neighbours don't matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import GenerationConfig

from polygraft.base.loader import Base
from polygraft.engine.engine import Engine
from polygraft.engine.model_info import default_sampling
from polygraft.engine.requests import generating as generating_module
from polygraft_types.answers import FinishReason
from polygraft_types.requests import (
    DEFAULT_MAX_NEW_TOKENS,
    AdapterRef,
    LoraPath,
    Request,
    SamplingParams,
    StoppingParams,
)
from tests.engine.asking import PROMPT, check_clean, request, run, text_of, tokens_of
from tests.engine.stores import copy_of, poison
from tests.engines import greedy, make_engine, run_greedy
from tests.tiny import EOS, VOCABULARY, byte_tokenizer

FAST = byte_tokenizer()


def ids(text: str) -> list[int]:
    return FAST(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int], int], None]:
    """Let every request generate given tokens, whatever the model says."""

    def script(tokens: list[int], prompt_tokens: int) -> None:
        def scripted(logits: torch.Tensor, params: Any, positions: Sequence[int]) -> list[int]:
            return [tokens[position - prompt_tokens] for position in positions]

        monkeypatch.setattr(generating_module, "sample", scripted)

    return script


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(engine: Engine) -> Clock:
    clock = engine.clock.read = Clock()
    return clock


# ---- how a request ends ----------------------------------------------------------------------------------


def test_the_end_of_sequence_ends_it_and_isnt_text(engine: Engine, say: Any) -> None:
    say([*ids("ab"), EOS, *ids("cd")], 5)
    [(text, tokens, finished)] = run(engine, request())
    assert (text, tokens) == ("ab", [*ids("ab"), EOS])
    assert (finished.reason, finished.stop_token_id, finished.stop_sequence) == (FinishReason.STOP, EOS, None)
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (5, 3)


def test_ignore_eos_goes_on(engine: Engine, say: Any) -> None:
    say([*ids("ab"), EOS, *ids("cd")], 5)
    [(text, tokens, finished)] = run(engine, request(ignore_eos=True, max_new_tokens=5))
    assert (text, tokens[2]) == ("abcd", EOS)
    assert (finished.reason, finished.stop_token_id) == (FinishReason.LENGTH, None)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_stop_token_ends_it_and_isnt_text(engine: Engine, say: Any, ignore_eos: bool) -> None:
    say(ids("abXcd"), 5)
    [(text, tokens, finished)] = run(engine, request(stop_token_ids=(7, *ids("X")), ignore_eos=ignore_eos))
    assert (text, tokens) == ("ab", ids("abX"))
    assert (finished.reason, finished.stop_token_id) == (FinishReason.STOP, ids("X")[0])


def test_a_stop_sequence_over_several_tokens_never_leaks(engine: Engine, say: Any) -> None:
    say(ids("one EN two END three"), 5)
    outputs = engine.generate([request(stop=("END", "three"))])[0]
    seen = ""
    for output in outputs:
        seen += output.text
        assert "one EN two ".startswith(seen)
    assert seen == "one EN two "
    finished = outputs[-1].finished
    assert finished is not None
    assert (finished.reason, finished.stop_sequence) == (FinishReason.STOP_SEQUENCE, "END")
    assert finished.usage.completion_tokens == len("one EN two END")


def test_what_was_held_back_comes_out_at_the_end(engine: Engine, say: Any) -> None:
    say(ids("one EN"), 5)
    [(text, _, finished)] = run(engine, request(stop=("END",), max_new_tokens=6))
    assert (text, finished.reason) == ("one EN", FinishReason.LENGTH)
    say([*ids("one EN"), EOS], 5)
    [(text, _, finished)] = run(engine, request(stop=("END",)))
    assert (text, finished.reason) == ("one EN", FinishReason.STOP)


def test_before_min_new_tokens_stop_tokens_cant_be_sampled(engine: Engine) -> None:
    [(_, free, _)] = run(engine, request(PROMPT, max_new_tokens=6, ignore_eos=True))
    first = free[0]
    [(_, tokens, finished)] = run(
        engine,
        request(PROMPT, max_new_tokens=6, min_new_tokens=3, stop_token_ids=(first,), ignore_eos=True),
    )
    assert first not in tokens[:3]
    assert len(tokens) >= 3
    assert finished.reason in {FinishReason.LENGTH, FinishReason.STOP}
    [(_, tokens, finished)] = run(engine, request(PROMPT, max_new_tokens=6, stop_token_ids=(first,)))
    assert (tokens, finished.reason) == ([first], FinishReason.STOP)


def test_before_min_new_tokens_stop_sequences_are_text(engine: Engine, say: Any) -> None:
    say(ids("xyxyxy"), 5)
    [(text, _, finished)] = run(engine, request(stop=("y",), min_new_tokens=3))
    assert (text, finished.reason) == ("xyx", FinishReason.STOP_SEQUENCE)


def test_min_new_tokens_masks_the_neighbours_nothing(engine: Engine) -> None:
    alone = run_greedy(engine, [greedy("a", PROMPT, None, 6)])
    limited = request(PROMPT, id="b", max_new_tokens=6, min_new_tokens=6, stop_token_ids=tuple(range(250)))
    with_neighbour = engine.generate([greedy("a", PROMPT, None, 6), limited])
    assert [tokens_of(with_neighbour[0])] == alone
    assert set(tokens_of(with_neighbour[1])).isdisjoint(range(250))


def test_max_new_tokens_ends_it(engine: Engine, say: Any) -> None:
    say(ids("abcdef"), 5)
    [(text, tokens, finished)] = run(engine, request(max_new_tokens=1))
    assert (text, len(tokens), finished.reason) == ("a", 1, FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("prompt_tokens", "adapter", "settled"),
    [(5, None, 251), (200, None, 56), (255, None, 1), (5, "p-tuning", 234)],
)
def test_max_new_tokens_is_what_the_context_leaves(
    engine: Engine, prompt_tokens: int, adapter: str | None, settled: int
) -> None:
    generation = engine.intake.prepare(request([1] * prompt_tokens, adapter))
    assert generation.max_new_tokens == min(settled, DEFAULT_MAX_NEW_TOKENS)
    generation.stack.release()


def test_a_request_that_fills_the_context_to_the_last_token(engine: Engine) -> None:
    [(_, tokens, finished)] = run(engine, request([1] * 250, ignore_eos=True, max_new_tokens=6))
    assert (len(tokens), finished.reason) == (6, FinishReason.LENGTH)


def test_the_time_limit_while_running(engine: Engine, say: Any, clock: Clock) -> None:
    say(ids("abE" + "c" * 20), 5)
    engine.submit(request(time_limit=2.0, stop=("END",)))
    outputs = []
    for _ in range(3):
        clock.now += 0.5
        outputs += engine.step().outputs
    clock.now += 0.49
    outputs += engine.step().outputs
    assert not outputs[-1].terminal
    clock.now += 0.02
    outputs += engine.step().outputs
    finished = outputs[-1].finished
    assert finished is not None
    assert (finished.reason, finished.usage.completion_tokens) == (FinishReason.TIME_LIMIT, 4)
    assert text_of(outputs) == "abEc"


def test_the_time_limit_brings_out_what_was_held_back(engine: Engine, say: Any, clock: Clock) -> None:
    say(ids("abEND"), 5)
    engine.submit(request(time_limit=2.0, stop=("END",)))
    outputs = [output for _ in range(3) for output in engine.step().outputs]
    assert text_of(outputs) == "ab"
    clock.now += 3
    outputs += engine.step().outputs
    assert text_of(outputs) == "abE"


def test_the_time_limit_while_waiting(llama: Path) -> None:
    engine = make_engine(llama, max_num_seqs=1)
    clock = engine.clock.read = Clock()
    engine.submit(request(PROMPT, id="first", ignore_eos=True, max_new_tokens=3))
    engine.submit(request(PROMPT, id="second", time_limit=1.0))
    engine.step()
    clock.now += 1
    outputs = engine.step().outputs
    [late] = [output.finished for output in outputs if output.request_id == "second"]
    assert late is not None
    assert (late.reason, late.usage.completion_tokens) == (FinishReason.TIME_LIMIT, 0)
    assert (late.timings.total, late.timings.queue, late.timings.prefill) == (1.0, None, None)
    while engine.has_work:
        engine.step()
    check_clean(engine)


# ---- aborts ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chunked(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[[str], Path],
    common_store: Callable[[str], Path],
) -> Engine:
    """An engine that takes a prompt in several steps."""
    store = copy_of(common_store("llama"), tmp_path_factory.mktemp("few"), "lora", "prefix", "p-tuning")
    return make_engine(tiny_model("llama"), store, max_num_batched_tokens=16)


@pytest.mark.parametrize("adapter", [None, "lora", "prefix", "p-tuning"])
@pytest.mark.parametrize("steps", range(6))
def test_abort_at_any_time_frees_everything_before_the_next_step(
    chunked: Engine, steps: int, adapter: str | None
) -> None:
    engine = chunked
    other = greedy("other", PROMPT, None, 5)
    expected = tokens_of(engine.generate([other])[0])
    engine.submit(other)
    engine.submit(request(PROMPT, adapter, id="gone", ignore_eos=True, max_new_tokens=50))
    outputs = [output for _ in range(steps) for output in engine.step().outputs]
    [end] = engine.abort("gone")
    assert end.finished is not None
    assert end.finished.reason is FinishReason.CANCELLED
    assert engine.abort("gone") == []
    engine.check_integrity()
    live = {"other", *(sequence.id for sequence in engine.scheduler if "soft" in sequence.id)}
    assert {sequence.id for sequence in engine.scheduler} <= live
    while engine.has_work:
        result = engine.step()
        outputs += result.outputs
    assert [
        token for output in outputs if output.request_id == "other" for token in output.token_ids
    ] == expected
    assert not any(output.terminal for output in outputs if output.request_id == "gone")
    check_clean(engine)


def test_abort_while_waiting(llama: Path) -> None:
    engine = make_engine(llama, max_num_seqs=1)
    engine.submit(greedy("first", PROMPT, None, 4))
    engine.submit(greedy("second", PROMPT, None, 4))
    engine.step()
    assert [sequence.id for sequence in engine.scheduler.waiting] == ["second"]
    assert len(engine.abort("second")) == 1
    while engine.has_work:
        assert all(output.request_id == "first" for output in engine.step().outputs)
    check_clean(engine)


def test_abort_of_an_unknown_request(engine: Engine) -> None:
    assert engine.abort("nobody") == []


# ---- many at once ----------------------------------------------------------------------------------------


def test_no_more_sequences_than_allowed(llama: Path) -> None:
    engine = make_engine(llama, max_num_seqs=2)
    for i in range(5):
        engine.submit(greedy(f"r{i}", PROMPT[: 3 + i], None, 4))
    ended = []
    while engine.has_work:
        result = engine.step()
        assert result.stats is not None
        assert result.stats.decode_rows + (result.stats.prefill_rows > 0) <= 2
        assert engine.occupancy.running <= 2
        assert result.occupancy in (None, engine.occupancy)
        ended += [output.request_id for output in result.outputs if output.terminal]
    assert sorted(ended) == [f"r{i}" for i in range(5)]
    check_clean(engine)


def sampled(id: str, seed: int, adapter: str | None = None) -> Request:
    return Request(
        id,
        tuple(PROMPT),
        () if adapter is None else (AdapterRef(adapter),),
        sampling=SamplingParams(temperature=1.5, top_p=0.9, seed=seed),
        stopping=StoppingParams(max_new_tokens=24, ignore_eos=True),
    )


def test_the_same_seed_gives_the_same_text_alone_among_others_and_preempted(
    engine: Engine, llama: Path, llama_store: Path
) -> None:
    alone = {
        (seed, adapter): run(engine, sampled("r", seed, adapter))[0][1]
        for seed in (0, 1, 2**63 - 1)
        for adapter in (None, "lora")
    }
    assert len({tuple(tokens) for tokens in alone.values()}) == len(alone)
    mixed = run(engine, *(sampled(str(key), *key) for key in alone), greedy("g", PROMPT, "prompt", 9))
    assert [tokens for _, tokens, _ in mixed[:-1]] == list(alone.values())
    # Two of them fit in the beginning and not to the end.
    small = make_engine(llama, llama_store, kv_cache_bytes=7 * 12_288)
    crowded = run(small, *(sampled(str(key), *key) for key in alone))
    assert [tokens for _, tokens, _ in crowded] == list(alone.values())
    assert sum(finished.preemptions for *_, finished in crowded) > 0
    assert {finished.seed for *_, finished in crowded} == {0, 1, 2**63 - 1}
    check_clean(small)


def test_stats_of_a_step(llama: Path, llama_store: Path) -> None:
    engine = make_engine(llama, llama_store)
    before = engine.scheduler.pool.used
    engine.submit(greedy("a", PROMPT, "lora", 3))
    engine.submit(greedy("b", PROMPT[:7], None, 3))
    result = engine.step()
    first, held, second = result.stats, result.occupancy, engine.step().stats
    assert first is not None
    assert held is not None
    assert second is not None
    assert (first.prefill_rows, first.decode_rows) == (len(PROMPT) + 7, 0)
    assert (second.prefill_rows, second.decode_rows) == (0, 2)
    assert (first.adapters, first.base_rows) == ((("lora", "lora"),), True)
    assert (held.running, held.waiting, first.preemptions) == (2, 0, 0)
    assert held.kv_blocks_used - before == 3
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_adapter_gone_bad_ends_its_requests_and_no_others(
    llama: Path, llama_store: Path, tmp_path: Path, temperature: float
) -> None:
    store = copy_of(llama_store, tmp_path / "s", "lora", "lora-bias", "rslora-patterns", "prefix", "prompt")
    engine = make_engine(llama, store)
    names = [None, "lora-bias", "rslora-patterns", "prefix", "prompt"]
    neighbours = [greedy(str(name), PROMPT, name, 8) for name in names]
    expected = run_greedy(engine, neighbours)
    poison(engine, "lora")
    bad = Request(
        "bad", tuple(PROMPT), (AdapterRef("lora"),), sampling=SamplingParams(temperature=temperature, seed=3)
    )
    *good, [failed] = engine.generate([*neighbours, bad])
    assert [tokens_of(outputs) for outputs in good] == expected
    assert failed.error is not None
    assert "not finite" in str(failed.error)
    assert (failed.token_ids, failed.text, failed.finished) == ((), "", None)
    check_clean(engine)
    # The blocks that held its NaN are used again and harm nobody.
    assert run_greedy(engine, neighbours) == expected


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_bad_logit_is_enough(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, value: float, temperature: float
) -> None:
    real = engine.runner.run

    def damaged(batch: Any) -> torch.Tensor:
        logits = real(batch)
        with torch.inference_mode():
            logits[0, 5] = value
        return logits

    monkeypatch.setattr(engine.runner, "run", damaged)
    [[output]] = engine.generate(
        [Request("r", (1, 2), sampling=SamplingParams(temperature=temperature, seed=1))]
    )
    assert output.error is not None


def test_usage_and_timings(engine: Engine, clock: Clock) -> None:
    engine.submit(greedy("r", PROMPT, "p-tuning", 3))
    end = None
    for _ in range(10):
        clock.now += 1.0
        for output in engine.step().outputs:
            end = output.finished or end
        if end is not None:
            break
    assert end is not None
    assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (len(PROMPT), 3)
    assert (end.usage.virtual_tokens, end.usage.cached_tokens) == (17, 0)
    assert end.adapter_generations == (engine.adapters.registry.get("p-tuning").generation,)
    timings = end.timings
    assert timings.queue is not None
    assert timings.queue >= 1.0
    assert timings.time_to_first_token == timings.queue + (timings.prefill or 0.0)
    assert timings.total == timings.time_to_first_token + 2.0


def test_the_base_has_no_generation(engine: Engine) -> None:
    [(_, _, finished)] = run(engine, request(max_new_tokens=1))
    assert (finished.adapter_generations, finished.path) == ((), LoraPath.UNMERGED)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, SamplingParams()),
        ({"temperature": 0.7}, SamplingParams()),
        ({"do_sample": True}, SamplingParams(temperature=1.0)),
        (
            {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "top_k": 40, "min_p": 0.1},
            SamplingParams(temperature=0.2, top_p=0.9, top_k=40, min_p=0.1),
        ),
        ({"do_sample": True, "top_k": None, "top_p": 0.5}, SamplingParams(temperature=1.0, top_p=0.5)),
    ],
)
def test_default_sampling_is_the_models_own(given: dict[str, Any], expected: SamplingParams) -> None:
    base = cast("Base", SimpleNamespace(model=SimpleNamespace(generation_config=GenerationConfig(**given))))
    got = default_sampling(base)
    if "top_k" not in given:
        got = SamplingParams(got.temperature, got.top_p, expected.top_k, got.min_p, got.seed)
    assert got == expected


@pytest.mark.parametrize("do_sample", [False, True])
def test_the_models_own_repetition_penalty_is_the_default(do_sample: bool) -> None:
    given = GenerationConfig(do_sample=do_sample, repetition_penalty=1.2)
    base = cast("Base", SimpleNamespace(model=SimpleNamespace(generation_config=given)))
    assert default_sampling(base).repetition_penalty == 1.2


def test_what_the_model_is(engine: Engine, llama: Path) -> None:
    model = engine.model
    assert (model.model, model.architecture, model.dtype) == (llama.name, "llama", "float32")
    assert (model.context_length, model.vocabulary_size, model.eos_token_ids) == (256, VOCABULARY, (EOS,))
    assert model.kv_cache_bytes == engine.scheduler.pool.num_blocks * 12_288 <= 4 * 2**20
    assert model.has_chat_template
