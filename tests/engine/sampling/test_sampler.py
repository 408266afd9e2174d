"""Sampling: the filters are transformers' own, the noise is a function of seed and position."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from polygraft.engine.sampling import sampler
from polygraft.engine.sampling.penalties import adjust
from polygraft.engine.sampling.sampler import sample, uniform
from polygraft_types.requests import GREEDY_BELOW, SamplingParams

VOCABULARY = 400


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def kept_by_transformers(row: torch.Tensor, p: SamplingParams) -> set[int]:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(p.temperature)])
    if p.top_k:
        warpers.append(TopKLogitsWarper(p.top_k))
    if p.top_p < 1:
        warpers.append(TopPLogitsWarper(p.top_p))
    if p.min_p:
        warpers.append(MinPLogitsWarper(p.min_p))
    return set(warpers(None, row[None])[0].isfinite().nonzero().flatten().tolist())


PARAMS = [
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.3, top_p=0.5),
    SamplingParams(temperature=1.0, top_k=9, top_p=0.8),
    SamplingParams(temperature=1.5, min_p=0.2),
    SamplingParams(temperature=0.9, top_k=20, top_p=0.95, min_p=0.05),
    SamplingParams(temperature=2.0, top_p=0.999),
]


@pytest.mark.parametrize("candidates", [8, 1024])
@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_draws_exactly_from_what_transformers_keeps(
    params: SamplingParams, candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "_CANDIDATES", candidates)
    row = logits(1, seed=3)[0]
    draws = 3000
    got = sample(row.expand(draws, -1), [params] * draws, range(draws))
    kept = kept_by_transformers(row, params)
    assert set(got) <= kept
    expected = (row / params.temperature).softmax(-1)
    expected = expected / expected[list(kept)].sum()
    likeliest = int(row.argmax())
    share = got.count(likeliest) / draws
    # Five standard errors of a binomial share; the noise is fixed, so this can't flicker.
    p = float(expected[likeliest])
    assert abs(share - p) < 5 * (p * (1 - p) / draws) ** 0.5 + 1e-9


def test_equal_logits_give_equal_tokens_in_any_batch() -> None:
    rows = logits(6)
    params = [SamplingParams(seed=i, temperature=1.0) if i % 2 else PARAMS[i] for i in range(6)]
    params[2] = SamplingParams()
    together = sample(rows, params, list(range(10, 16)))
    alone = [sample(rows[i : i + 1], [params[i]], [10 + i])[0] for i in range(6)]
    order = [3, 1, 5, 0, 2, 4]
    shuffled = sample(rows[order], [params[i] for i in order], [10 + i for i in order])
    assert together == alone
    assert [shuffled[order.index(i)] for i in range(6)] == alone


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    row = torch.zeros(1, VOCABULARY, dtype=torch.bfloat16)
    row[0, [7, 11]] = 2.0
    assert sample(row, [SamplingParams()], [0]) == [7]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, top_k=5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("value", "where"),
    [(torch.nan, [3]), (torch.inf, [0]), (-torch.inf, range(VOCABULARY))],
    ids=["nan", "infinity", "nothing left"],
)
def test_rows_that_are_not_finite_get_no_token_and_harm_no_other(
    params: SamplingParams, dtype: torch.dtype, value: float, where: list[int]
) -> None:
    rows = logits(3).to(dtype)
    sound = sample(rows[[0, 2]], [params] * 2, [0, 2])
    rows[1, list(where)] = value
    assert sample(rows, [params] * 3, [0, 1, 2]) == [sound[0], None, sound[1]]
    assert None not in sound


TINY = [5e-324, 1e-300, 1e-45, 1e-38, 1e-30, 1e-7, 1e-6, 1e-5, 1e-3]


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e4, 1e30])
@pytest.mark.parametrize("temperature", TINY)
def test_a_tiny_temperature_takes_the_likeliest(temperature: float, scale: float) -> None:
    rows = logits(20) * scale
    params = [SamplingParams(temperature=temperature, seed=seed) for seed in range(20)]
    got = sample(rows, params, range(20))
    # How much less likely than the likeliest a token is that no draw can reach.
    worst = max(temperature, GREEDY_BELOW) * 40
    for row, token in zip(rows, got, strict=True):
        assert token is not None
        assert row[token] >= row.max() - worst
    if scale >= 1 and temperature <= 1e-5:
        assert got == rows.argmax(-1).tolist()


def test_temperatures_below_the_least_are_greedy() -> None:
    """Of two equal logits the first is always taken, as without a temperature."""
    row = torch.zeros(1, VOCABULARY)
    for temperature in (0.0, 5e-324, 1e-38, 0.99 * GREEDY_BELOW):
        params = [SamplingParams(temperature=temperature, seed=seed) for seed in range(20)]
        assert sample(row.expand(20, -1), params, range(20)) == [0] * 20
    least = [SamplingParams(temperature=GREEDY_BELOW, seed=seed) for seed in range(20)]
    assert len(set(sample(row.expand(20, -1), least, range(20)))) > 10


def test_a_low_temperature_keeps_the_odds_of_close_tokens() -> None:
    """Divided by it, logits of 20 would be rounded by more than they differ."""
    temperature = 1e-5
    row = torch.full((1, VOCABULARY), -5.0)
    row[0, 7], row[0, 9] = 20.0, torch.nextafter(torch.tensor(20.0), torch.tensor(0.0))
    difference = float(row[0, 7] - row[0, 9]) / temperature
    draws = 4000
    got = sample(row.expand(draws, -1), [SamplingParams(temperature=temperature)] * draws, range(draws))
    assert set(got) == {7, 9}
    share = 1 / (1 + math.exp(-difference))
    assert abs(got.count(7) / draws - share) < 5 * (share * (1 - share) / draws) ** 0.5


EXTREMES = {
    "temperature": st.sampled_from([0.0, *TINY, 0.5, 1.0, 100.0]),
    "top_p": st.sampled_from([5e-324, 1e-45, 1e-38, 1e-9, 0.5, 1 - 1e-12, 1.0]),
    "top_k": st.sampled_from([0, 1, 2, VOCABULARY, 2**32 - 1]),
    "min_p": st.sampled_from([0.0, 5e-324, 1e-38, 0.5, 1 - 1e-12, 1.0]),
    "repetition_penalty": st.sampled_from([5e-324, 1e-300, 1e-38, 1e-6, 0.5, 1.0, 100.0]),
    "presence_penalty": st.sampled_from([-2.0, 0.0, 5e-324, 2.0]),
    "frequency_penalty": st.sampled_from([-2.0, 0.0, 5e-324, 2.0]),
    "logit_bias": st.sampled_from([(), ((3, 100.0),), ((0, -100.0), (5, 5e-324))]),
}


@given(
    params=st.builds(SamplingParams, seed=st.integers(0, 5), **EXTREMES),
    scale=st.sampled_from([0.0, 1e-38, 1.0, 1e4, 1e37]),
    unknown=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_no_parameters_make_a_token_that_cannot_be(
    params: SamplingParams, scale: float, unknown: bool
) -> None:
    """Whatever is asked for, the answer is a token that can be drawn from the changed logits."""
    row = logits(1, seed=params.seed) * scale
    if unknown:
        row[0, VOCABULARY // 2 :] = -torch.inf
    changed = adjust(row.clone(), [params], [[1, 2, 3, 3, 3]], [2])
    assert not changed.isnan().any()
    [token] = sample(changed, [params], [5])
    assert token is not None
    largest = changed[0].double().max()
    # e^-750 is 0 even in float64.
    reach = 0.0 if params.greedy else 750 * max(params.temperature, GREEDY_BELOW)
    assert changed[0, token].double() >= largest - reach


def test_noise_is_even_and_never_repeats() -> None:
    draws = [uniform(seed, position) for seed in range(50) for position in range(100)]
    assert all(0 <= draw < 1 for draw in draws)
    assert len(set(draws)) == len(draws)
    counts = torch.histc(torch.tensor(draws, dtype=torch.float64), 10, 0, 1)
    assert (counts - 500).abs().max() < 5 * (5000 * 0.1 * 0.9) ** 0.5


def test_a_rare_token_at_the_end_of_the_vocabulary_can_be_drawn() -> None:
    row = torch.full((1, 100_000), 0.0)
    tokens = sample(row.expand(200, -1), [SamplingParams(temperature=1.0, seed=1)] * 200, range(200))
    assert max(tokens) > 90_000
    assert min(tokens) < 10_000


@given(
    rows=st.integers(1, 40),
    width=st.sampled_from([1, 15, 16, 64, 257, 5000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    levels=st.integers(1, 50),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_the_likeliest_are_torchs_own(
    rows: int, width: int, dtype: torch.dtype, levels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few levels, so that many are equal.
    logits = (torch.randint(-levels, levels, (rows, width), generator=generator) / 3).to(dtype)
    for value in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        at = torch.randint(rows * width, (2,), generator=generator)
        logits.view(-1)[at] = value
    first = logits.float().numpy().argmax(-1)
    finite = logits.gather(-1, torch.from_numpy(first)[:, None]).isfinite()[:, 0]
    expected = [int(token) if ok else None for token, ok in zip(first, finite, strict=True)]
    assert sample(logits, [SamplingParams()] * rows, [0] * rows) == expected
