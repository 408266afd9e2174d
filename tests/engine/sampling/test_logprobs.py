"""Log-probabilities are the model's own, PEFT's within tolerance, alone, in company and preempted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from polygraft.base.tokenizer import text_tokenizer
from polygraft.core.output import RequestOutput
from polygraft.engine.engine import Engine
from polygraft.engine.sampling import logprobs as logprobs_module
from polygraft.engine.sampling.logprobs import TokenTexts, likelihoods
from polygraft_types.answers import FinishReason, TokenLogprob
from polygraft_types.requests import (
    AdapterRef,
    Chat,
    ChatMessage,
    Request,
    ResponseParams,
    SamplingParams,
    StoppingParams,
)
from tests.engine.asking import PROMPT, check_clean, text_of, tokens_of
from tests.engine.stores import copy_of, poison
from tests.engines import greedy, make_engine
from tests.equivalence.reference import load_reference
from tests.tiny import byte_tokenizer

TOLERANCE = 2e-4
ADAPTERS = [None, "lora", "prefix", "p-tuning"]


def ask(
    id: str, adapter: str | None = None, prompt: Sequence[int] = PROMPT, steps: int = 6, **response: object
) -> Request:
    return Request(
        id,
        tuple(prompt),
        () if adapter is None else (AdapterRef(adapter),),
        stopping=StoppingParams(max_new_tokens=steps, ignore_eos=True),
        response=ResponseParams(**response),  # type: ignore[arg-type]
    )


def logprobs_of(outputs: Sequence[RequestOutput]) -> list[TokenLogprob]:
    assert outputs[-1].finished is not None, outputs[-1].error
    return [one for output in outputs for one in output.logprobs]


def by_peft(model: Path, store: Path, adapter: str | None, tokens: list[int]) -> torch.Tensor:
    """log_softmax behind each of the tokens, [tokens, vocabulary]."""
    reference = load_reference(model, None if adapter is None else store / adapter, "float32")
    with torch.inference_mode():
        logits = reference(input_ids=torch.tensor([tokens])).logits[0]
    return logits[-len(tokens) :].log_softmax(-1)


def check_against_peft(
    got: list[TokenLogprob], tokens: list[int], expected: torch.Tensor, first: int, top: int
) -> None:
    """`got` are the tokens from `first` on."""
    assert [one.token_id for one in got] == tokens[first:]
    for at, one in enumerate(got, start=first):
        if at == 0:
            assert one.logprob is None
            assert one.top == ()
            continue
        row = expected[at - 1]
        assert one.logprob == pytest.approx(float(row[tokens[at]]), abs=TOLERANCE)
        assert len(one.top) == top
        values = [near.logprob for near in one.top]
        assert values == sorted(values, reverse=True)
        assert values == pytest.approx(row.topk(top).values.tolist(), abs=TOLERANCE)
        assert all(
            near.logprob == pytest.approx(float(row[near.token_id]), abs=TOLERANCE) for near in one.top
        )


# ---- the numbers -----------------------------------------------------------------------------------------


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(1)) * 4
    tokens, top = [3, 1, 4, 1, 5, 9, 2], [0, 3, 1, 0, 50, 2, 2]
    whole = likelihoods(logits, tokens, top)
    monkeypatch.setattr(logprobs_module, "_SLICE", 100)
    assert likelihoods(logits, tokens, top) == whole
    assert [len(one.top) for one in whole] == top
    expected = logits.double().log_softmax(-1)
    assert [one.logprob for one in whole] == pytest.approx(
        [float(expected[row, token]) for row, token in enumerate(tokens)], abs=1e-5
    )
    assert [one.is_greedy for one in whole] == [
        int(logits[row].argmax()) == token for row, token in enumerate(tokens)
    ]


def test_texts_of_tokens() -> None:
    texts = TokenTexts(text_tokenizer(byte_tokenizer()))
    ids = byte_tokenizer()("a é", add_special_tokens=False)["input_ids"]
    assert [texts(token) for token in [*ids, 256]] == ["a", " ", "\ufffd", "\ufffd", "<eos>"]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_generated_and_echoed_are_pefts(
    engine: Engine, llama: Path, llama_store: Path, adapter: str | None
) -> None:
    alone = engine.generate([ask("r", adapter, top_logprobs=3, echo=True)])[0]
    company = [ask(str(name), name, logprobs=True) for name in ADAPTERS] + [greedy("g", PROMPT, None, 9)]
    mixed = engine.generate([*company[:2], ask("r", adapter, top_logprobs=3, echo=True), *company[2:]])
    tokens = [*PROMPT, *tokens_of(alone)]
    expected = by_peft(llama, llama_store, adapter, tokens)
    for outputs in (alone, mixed[2]):
        assert tokens_of(outputs) == tokens[len(PROMPT) :]
        check_against_peft(logprobs_of(outputs), tokens, expected, 0, 3)
    plain = mixed[ADAPTERS.index(adapter) if ADAPTERS.index(adapter) < 2 else ADAPTERS.index(adapter) + 1]
    check_against_peft(logprobs_of(plain), tokens, expected, len(PROMPT), 0)
    assert logprobs_of(mixed[-1]) == []


def test_they_are_of_the_distribution_before_anything_changes_it(engine: Engine, llama: Path) -> None:
    free = tokens_of(engine.generate([ask("r")])[0])
    request = Request(
        "r",
        tuple(PROMPT),
        sampling=SamplingParams(
            temperature=0.5, top_k=1, repetition_penalty=1.7, logit_bias=((50, 100.0),), presence_penalty=1.0
        ),
        stopping=StoppingParams(max_new_tokens=4, min_new_tokens=4, stop_token_ids=(free[0],)),
        response=ResponseParams(logprobs=True, top_logprobs=1),
    )
    [outputs] = engine.generate([request])
    tokens = [*PROMPT, *tokens_of(outputs)]
    assert tokens_of(outputs)[0] == 50
    got = logprobs_of(outputs)
    assert got[0].top[0].token_id == free[0]
    check_against_peft(got, tokens, by_peft(llama, llama, None, tokens), len(PROMPT), 1)


# ---- echo ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [512, 7])
def test_the_echo_survives_chunks_the_cache_and_preemption(
    llama: Path, llama_store: Path, tmp_path: Path, budget: int
) -> None:
    store = copy_of(llama_store, tmp_path / "s", "lora")
    engine = make_engine(
        llama, store, kv_cache_bytes=7 * 12_288, max_num_batched_tokens=budget, max_num_seqs=7
    )
    names = [None, "lora"]
    requests = [ask(f"{i}{a}", a, steps=24, logprobs=True, echo=True) for i in range(3) for a in names]
    plain = [tokens_of(outputs) for outputs in engine.generate([ask(f"{a}", a, steps=24) for a in names])]
    answers = engine.generate(requests)
    for outputs, adapter, tokens in zip(answers, names * 3, plain * 3, strict=True):
        assert outputs[-1].finished is not None
        assert outputs[-1].finished.usage.cached_tokens == 0
        whole = [*PROMPT, *tokens]
        check_against_peft(logprobs_of(outputs), whole, by_peft(llama, store, adapter, whole), 0, 0)
        assert outputs[0].prompt_ids == tuple(PROMPT)
        assert all(output.prompt_ids == () for output in outputs[1:])
    preemptions = sum(outputs[-1].finished.preemptions for outputs in answers if outputs[-1].finished)
    assert preemptions > 0 or budget == 7
    check_clean(engine)


def test_without_logprobs_the_echo_uses_the_cache(engine: Engine) -> None:
    engine.generate([ask("first")])
    [outputs] = engine.generate([ask("second", echo=True)])
    assert outputs[-1].finished is not None
    assert outputs[-1].finished.usage.cached_tokens == 16
    assert outputs[0].prompt_ids == tuple(PROMPT)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("grün, ", "grün, "),
        ((*tuple(b"abc"), 256), None),
        (Chat((ChatMessage("user", "hi"),)), "[user]hi\n[assistant]"),
    ],
)
def test_the_text_starts_with_the_prompts(
    engine: Engine, prompt: str | tuple[int, ...] | Chat, text: str | None
) -> None:
    stopping = StoppingParams(max_new_tokens=4, ignore_eos=True)
    plain, echoed = engine.generate(
        [
            Request("p", prompt, stopping=stopping),
            Request("e", prompt, stopping=stopping, response=ResponseParams(echo=True)),
        ]
    )
    expected = engine.prompts.base.decode(prompt) if text is None and isinstance(prompt, tuple) else text
    assert text_of(echoed) == str(expected) + text_of(plain)
    assert tokens_of(echoed) == tokens_of(plain)


def test_a_prompt_of_one_token(engine: Engine) -> None:
    [outputs] = engine.generate([ask("r", prompt=[65], logprobs=True, echo=True)])
    got = logprobs_of(outputs)
    assert len(got) == 7
    assert (got[0].token_id, got[0].logprob) == (65, None)


def test_what_ends_before_its_first_token_is_echoed_all_the_same(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.submit(ask("r", echo=True, logprobs=True))
    [end] = engine.abort("r")
    assert end.finished is not None
    assert end.finished.reason is FinishReason.CANCELLED
    assert end.prompt_ids == tuple(PROMPT)
    assert [one.token_id for one in end.logprobs] == PROMPT[:1]
    engine.clock.read = lambda: 0.0
    late = Request("t", "hi", stopping=StoppingParams(time_limit=1.0), response=ResponseParams(echo=True))
    engine.submit(late)
    engine.clock.read = lambda: 2.0
    [end] = engine.step().outputs
    assert end.text == "hi"


def test_logits_that_are_not_finite_end_it(llama: Path, llama_store: Path, tmp_path: Path) -> None:
    engine = make_engine(llama, copy_of(llama_store, tmp_path / "s", "lora"))
    poison(engine, "lora")
    bad, good = engine.generate(
        [ask("bad", "lora", echo=True, logprobs=True), ask("good", echo=True, logprobs=True)]
    )
    assert "not finite" in str(bad[-1].error)
    assert len(logprobs_of(good)) == len(PROMPT) + 6
    check_clean(engine)
