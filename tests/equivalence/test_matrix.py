"""Each row of a mixed batch equals the same request alone, equals its library's own answer to it.

float32: the same greedy tokens. Other precisions: along the float32 reference's tokens, our error against it
is at most 1.5 times the library's own error in that precision, and a greedy token differs only where the
reference's two likeliest are closer than twice that error.
"""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polygraft.engine.engine import Engine
from tests.adapterhub.folders import BOTTLENECKS, WITHOUT, save_bottleneck
from tests.engines import forced_logits, greedy, make_engine, run_greedy
from tests.equivalence.cases import (
    BASE,
    TOLERANCE,
    Answers,
    Case,
    check_as_near_as_peft,
    check_exact,
    check_rows_differ,
    make_case,
)
from tests.peft_folders import KINDS
from tests.tiny import CONFIGS

ROWS = [BASE, *KINDS, *BOTTLENECKS]
STEPS = 8
PRECISIONS = ["bfloat16", "int8", "nf4", "fp4"]


def rows_of(architecture: str) -> list[str]:
    """What is served on it."""
    return [row for row in ROWS if row not in BOTTLENECKS or architecture not in WITHOUT]


def prompt(row: str, seed: int = 0) -> list[int]:
    """Different lengths, shorter and longer than a block and than Gemma's window."""
    at = ROWS.index(row)
    generator = torch.Generator().manual_seed(100 * seed + at)
    return torch.randint(0, 250, (3 + (7 * at + 11 * seed) % 40,), generator=generator).tolist()


@pytest.fixture(scope="module")
def store(
    tiny_model: Callable[[str], Path],
    adapter_store: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """PEFT's kinds and AdapterHub's together."""

    @functools.cache
    def get(architecture: str) -> Path:
        folder: Path = tmp_path_factory.mktemp(architecture) / "store"
        shutil.copytree(adapter_store(architecture), folder)
        for seed, kind in enumerate(BOTTLENECKS):
            if kind in rows_of(architecture):
                save_bottleneck(folder / kind, tiny_model(architecture), kind, seed)
        return folder

    return get


@pytest.fixture(scope="module")
def case(tiny_model: Callable[[str], Path], store: Callable[[str], Path]) -> Callable[[str, str], Case]:
    @functools.cache
    def answers(architecture: str) -> Answers:
        prompts = {row: prompt(row) for row in rows_of(architecture)}
        return Answers(tiny_model(architecture), store(architecture), prompts, STEPS)

    return functools.cache(lambda architecture, precision: make_case(answers(architecture), precision))


@pytest.mark.parametrize(
    ("architecture", "row"),
    [(architecture, row) for architecture in CONFIGS for row in rows_of(architecture)],
)
def test_float32_gives_the_same_tokens(case: Callable[[str, str], Case], architecture: str, row: str) -> None:
    check_exact(case(architecture, "float32"), row)


def _cells() -> Iterator[Any]:
    """Every row on every base in every precision. A Latin square of them, in which each row meets each base and
    each precision, and these each other, is for every run; the rest is for the whole matrix."""
    for (a, architecture), (p, precision) in itertools.product(enumerate(CONFIGS), enumerate(PRECISIONS)):
        for at, row in enumerate(rows_of(architecture)):
            covers = (at + a + p) % len(PRECISIONS) == 0
            yield pytest.param(architecture, precision, row, marks=() if covers else pytest.mark.full)
    for at, row in enumerate(rows_of("llama")):
        yield pytest.param("llama", "float16", row, marks=() if at % 4 == 0 else pytest.mark.full)


@pytest.mark.parametrize(("architecture", "precision", "row"), list(_cells()))
def test_other_precisions_are_as_near_as_the_library(
    case: Callable[[str, str], Case], architecture: str, precision: str, row: str
) -> None:
    check_as_near_as_peft(case(architecture, precision), row)


@pytest.mark.parametrize("examples", [4, pytest.param(50, marks=pytest.mark.full)])
@pytest.mark.parametrize("precision", ["float32", *PRECISIONS])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_no_neighbours_and_no_order_change_a_row(
    case: Callable[[str, str], Case], architecture: str, precision: str, examples: int
) -> None:
    """Any rows at any of their steps, in any order, have the logits that they have beside all others."""
    this = case(architecture, precision)
    steps = [(row, at) for row in rows_of(architecture) for at in range(STEPS)]

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.sampled_from(steps), min_size=1, max_size=48))
    def check(batch: list[tuple[str, int]]) -> None:
        logits = forced_logits(this.engine, [this.step_of(row, at) for row, at in batch])
        expected = torch.stack([this.mixed_logits[row][at] for row, at in batch])
        assert (logits - expected).abs().max() < TOLERANCE * (1 if precision == "float32" else 100)

    check()


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_adapter_differs_from_the_base_and_from_every_other(
    case: Callable[[str, str], Case], architecture: str
) -> None:
    check_rows_differ(case(architecture, "float32"))


@pytest.fixture(scope="module")
def crowded(tiny_model: Callable[[str], Path], store: Callable[[str], Path]) -> Callable[[str, bool], Engine]:
    """Few blocks and few tokens a step: prompts come in chunks, and sequences lose their blocks."""
    return functools.cache(
        lambda architecture, native: make_engine(
            tiny_model(architecture),
            store(architecture),
            native=native,
            kv_cache_bytes=220_000,
            max_num_seqs=9,
            max_num_batched_tokens=24,
            block_size=8 if architecture == "qwen2" else 16,
        )
    )


def check_any_mix(engine: Engine, case: Case, seed: int, several: int) -> None:
    """A random multiset of requests in a random order gives each its reference's tokens."""
    generator = torch.Generator().manual_seed(seed)
    served = list(case.prompts)
    rows = [served[i] for i in torch.randint(0, len(served), (several,), generator=generator)]
    requests = [
        greedy(f"{at}", prompt(row), None if row == BASE else row, STEPS) for at, row in enumerate(rows)
    ]
    assert run_greedy(engine, requests) == [case.exact[row].tokens for row in rows]


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_neighbours_order_chunks_and_preemption_change_nothing(
    case: Callable[[str, str], Case],
    crowded: Callable[[str, bool], Engine],
    architecture: str,
    native: bool,
) -> None:
    engine = crowded(architecture, native)
    for seed in range(2):
        check_any_mix(engine, case(architecture, "float32"), seed, several=24)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("architecture", CONFIGS)
def test_any_mix_of_fifty_seeds(
    case: Callable[[str, str], Case], crowded: Callable[[str, bool], Engine], architecture: str, seed: int
) -> None:
    engine = crowded(architecture, seed % 2 == 0)
    check_any_mix(engine, case(architecture, "float32"), 1000 + seed, several=40)
