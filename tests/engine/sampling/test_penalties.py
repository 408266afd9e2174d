"""Penalties and biases are transformers' and OpenAI's own, and change no neighbour."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, RepetitionPenaltyLogitsProcessor

from polygraft.engine.engine import Engine
from polygraft.engine.sampling.penalties import adjust
from polygraft_types.requests import AdapterRef, Request, SamplingParams, StoppingParams
from tests.engine.asking import PROMPT, check_clean, run
from tests.engines import greedy, make_engine, run_greedy

TOKENS = [5, 9, 5, 7, 9, 9, 3]
PROMPT_TOKENS = 3


def logits(rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, 40, generator=torch.Generator().manual_seed(2)) * 3


def changed(row: torch.Tensor, **params: Any) -> torch.Tensor:
    return adjust(row.clone(), [SamplingParams(**params)], [TOKENS], [PROMPT_TOKENS])


@pytest.mark.parametrize("penalty", [1e-3, 0.5, 1.3, 100.0])
def test_the_repetition_penalty_is_transformers(penalty: float) -> None:
    row = logits()
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([TOKENS]), row.clone())
    torch.testing.assert_close(changed(row, repetition_penalty=penalty), expected)
    assert not torch.equal(expected, row)


def test_presence_and_frequency_are_openais_over_what_was_generated() -> None:
    row = logits()
    expected = row.clone()
    for token, count in Counter(TOKENS[PROMPT_TOKENS:]).items():
        expected[0, token] -= 0.7 + 1.1 * count
    got = changed(row, presence_penalty=0.7, frequency_penalty=1.1)
    torch.testing.assert_close(got, expected)
    assert got[0, 5] == row[0, 5]  # in the prompt alone


def test_a_bias_comes_before_the_penalties() -> None:
    row = logits()
    biased = row.clone()
    biased[0, 5] += 50
    biased[0, 6] -= 100
    expected = RepetitionPenaltyLogitsProcessor(2.0)(torch.tensor([TOKENS]), biased)
    torch.testing.assert_close(
        changed(row, logit_bias=((5, 50.0), (6, -100.0)), repetition_penalty=2.0), expected
    )


def test_the_least_penalty_keeps_logits_finite() -> None:
    got = changed(logits(), repetition_penalty=5e-324)
    assert torch.isfinite(got).all()
    assert torch.isfinite(changed(torch.zeros(1, 40), repetition_penalty=5e-324)).all()


def test_rows_that_do_not_ask_stay_as_they_are() -> None:
    rows = logits(3).bfloat16()
    params = [SamplingParams(), SamplingParams(presence_penalty=0.1), SamplingParams(temperature=1.0)]
    got = adjust(rows.clone(), params, [TOKENS] * 3, [PROMPT_TOKENS] * 3)
    assert got.dtype == torch.float32
    assert torch.equal(got[[0, 2]], rows[[0, 2]].float())
    assert got[1, 9] == rows[1, 9].float() - 0.1
    assert adjust(rows, params[:1], [TOKENS], [PROMPT_TOKENS]) is rows


def test_greedy_with_a_penalty_is_transformers(engine: Engine, llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    prompt = torch.tensor([PROMPT])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16, "min_new_tokens": 16}
    with torch.inference_mode():
        out = model.generate(prompt, eos_token_id=None, repetition_penalty=1.4, **options)
        plain = model.generate(prompt, eos_token_id=None, **options)
    expected = out[0].tolist()[len(PROMPT) :]
    asked = Request(
        "r",
        tuple(PROMPT),
        sampling=SamplingParams(repetition_penalty=1.4),
        stopping=StoppingParams(max_new_tokens=16, ignore_eos=True),
    )
    others = [greedy("g", PROMPT, None, 16), greedy("p", PROMPT[:7], "lora", 16)]
    assert run(engine, asked)[0][1] == expected
    mixed = run(engine, others[0], asked, others[1])
    assert mixed[1][1] == expected
    assert mixed[0][1] == plain[0].tolist()[len(PROMPT) :] != expected
    assert mixed[2][1] == run_greedy(engine, [others[1]])[0]


def test_a_bias_bans_or_forces_a_token(engine: Engine) -> None:
    free = run_greedy(engine, [greedy("g", PROMPT, None, 5)])[0]

    def biased(*bias: tuple[int, float]) -> list[int]:
        params = SamplingParams(logit_bias=bias)
        stopping = StoppingParams(max_new_tokens=5, ignore_eos=True)
        return run(engine, Request("r", tuple(PROMPT), sampling=params, stopping=stopping))[0][1]

    assert set(biased(*((token, -100.0) for token in free))).isdisjoint(free)
    assert biased((77, 100.0)) == [77] * 5


def penalized(id: str, seed: int, adapter: str | None) -> Request:
    return Request(
        id,
        tuple(PROMPT),
        () if adapter is None else (AdapterRef(adapter),),
        sampling=SamplingParams(
            temperature=1.2,
            seed=seed,
            repetition_penalty=1.2,
            presence_penalty=0.5,
            frequency_penalty=0.8,
            logit_bias=((40 + seed, 3.0),),
        ),
        stopping=StoppingParams(max_new_tokens=24, ignore_eos=True),
    )


def test_the_same_tokens_alone_among_others_and_preempted(
    engine: Engine, llama: Path, llama_store: Path
) -> None:
    requests = [penalized(f"{s}{a}", s, a) for s in (0, 1, 2) for a in (None, "lora")]
    alone = [run(engine, request)[0][1] for request in requests]
    assert len(set(map(tuple, alone))) == len(alone)
    mixed = run(engine, *requests, greedy("g", PROMPT, "prompt", 9))
    assert [tokens for _, tokens, _ in mixed[:-1]] == alone
    small = make_engine(llama, llama_store, kv_cache_bytes=7 * 12_288)
    crowded = run(small, *requests)
    assert [tokens for _, tokens, _ in crowded] == alone
    assert sum(finished.preemptions for *_, finished in crowded) > 0
    check_clean(small)
