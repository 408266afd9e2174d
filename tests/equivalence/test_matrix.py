"""Each row of a mixed batch equals the same request alone, equals PEFT's own answer to it.

float32: the same greedy tokens. Other precisions: along the float32 reference's tokens, our error against it
is at most 1.5 times PEFT's own error in that precision, and a greedy token differs only where the
reference's two likeliest are closer than twice that error.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from polygraft.engine.engine import Engine
from tests.engines import greedy, make_engine, run_greedy
from tests.equivalence.cases import (
    BASE,
    Answers,
    Case,
    check_as_near_as_peft,
    check_exact,
    check_rows_differ,
    make_case,
)
from tests.peft_folders import KINDS
from tests.tiny import CONFIGS

ROWS = [BASE, *KINDS]
STEPS = 8


def prompt(row: str, seed: int = 0) -> list[int]:
    """Different lengths, shorter and longer than a block and than Gemma's window."""
    at = ROWS.index(row)
    generator = torch.Generator().manual_seed(100 * seed + at)
    return torch.randint(0, 250, (3 + (7 * at + 11 * seed) % 40,), generator=generator).tolist()


@pytest.fixture(scope="module")
def case(
    tiny_model: Callable[[str], Path], adapter_store: Callable[[str], Path]
) -> Callable[[str, str], Case]:
    @functools.cache
    def answers(architecture: str) -> Answers:
        prompts = {row: prompt(row) for row in ROWS}
        return Answers(tiny_model(architecture), adapter_store(architecture), prompts, STEPS)

    return functools.cache(lambda architecture, precision: make_case(answers(architecture), precision))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_float32_gives_the_same_tokens(case: Callable[[str, str], Case], architecture: str, row: str) -> None:
    check_exact(case(architecture, "float32"), row)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(
    ("architecture", "precision"),
    [*itertools.product(CONFIGS, ["bfloat16", "int8", "nf4", "fp4"]), ("llama", "float16")],
)
def test_other_precisions_are_as_near_as_peft(
    case: Callable[[str, str], Case], architecture: str, precision: str, row: str
) -> None:
    check_as_near_as_peft(case(architecture, precision), row)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_adapter_differs_from_the_base_and_from_every_other(
    case: Callable[[str, str], Case], architecture: str
) -> None:
    check_rows_differ(case(architecture, "float32"))


def crowded(
    tiny_model: Callable[[str], Path], adapter_store: Callable[[str], Path], architecture: str, native: bool
) -> Engine:
    """Few blocks and few tokens a step: prompts come in chunks, and sequences lose their blocks."""
    return make_engine(
        tiny_model(architecture),
        adapter_store(architecture),
        native=native,
        kv_cache_bytes=220_000,
        max_num_seqs=9,
        max_num_batched_tokens=24,
        block_size=8 if architecture == "qwen2" else 16,
    )


def check_any_mix(engine: Engine, case: Case, seed: int, several: int) -> None:
    """A random multiset of requests in a random order gives each its reference's tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = [ROWS[i] for i in torch.randint(0, len(ROWS), (several,), generator=generator)]
    requests = [
        greedy(f"{at}", prompt(row), None if row == BASE else row, STEPS) for at, row in enumerate(rows)
    ]
    assert run_greedy(engine, requests) == [case.exact[row].tokens for row in rows]


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_neighbours_order_chunks_and_preemption_change_nothing(
    case: Callable[[str, str], Case],
    tiny_model: Callable[[str], Path],
    adapter_store: Callable[[str], Path],
    architecture: str,
    native: bool,
) -> None:
    engine = crowded(tiny_model, adapter_store, architecture, native)
    for seed in range(2):
        check_any_mix(engine, case(architecture, "float32"), seed, several=24)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("architecture", CONFIGS)
def test_any_mix_of_fifty_seeds(
    case: Callable[[str, str], Case],
    tiny_model: Callable[[str], Path],
    adapter_store: Callable[[str], Path],
    architecture: str,
    seed: int,
) -> None:
    engine = crowded(tiny_model, adapter_store, architecture, native=seed % 2 == 0)
    check_any_mix(engine, case(architecture, "float32"), 1000 + seed, several=40)
