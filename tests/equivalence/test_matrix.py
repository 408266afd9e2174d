"""Each row of a mixed batch equals the same request alone, equals PEFT's own answer to it.

float32: the same greedy tokens. Other precisions: along the float32 reference's tokens, our error against it
is at most 1.5 times PEFT's own error in that precision, and a greedy token differs only where the
reference's two likeliest are closer than twice that error.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from polygraft.engine.engine import Engine
from tests.engines import forced_logits, greedy, make_engine, run_greedy
from tests.equivalence.reference import Reference, forced, generate, load_reference
from tests.peft_folders import KINDS
from tests.tiny import CONFIGS

BASE = "base"
ROWS = [BASE, *KINDS]
STEPS = 8
TOLERANCE = 1e-4  # on logits of size 5, in float32
ALLOWANCE = 1.5


def prompt(row: str, seed: int = 0) -> list[int]:
    """Different lengths, shorter and longer than a block and than Gemma's window."""
    at = ROWS.index(row)
    generator = torch.Generator().manual_seed(100 * seed + at)
    return torch.randint(0, 250, (3 + (7 * at + 11 * seed) % 40,), generator=generator).tolist()


@dataclass(frozen=True)
class Case:
    """One architecture in one precision: our engine, and PEFT's answers to each row's request."""

    engine: Engine
    exact: dict[str, Reference]
    peers: dict[str, torch.Tensor]

    @functools.cached_property
    def mixed_tokens(self) -> dict[str, list[int]]:
        requests = [greedy(row, prompt(row), None if row == BASE else row, STEPS) for row in ROWS]
        return dict(zip(ROWS, run_greedy(self.engine, requests), strict=True))

    @functools.cached_property
    def mixed_logits(self) -> dict[str, torch.Tensor]:
        rows = [row for row in ROWS for _ in range(STEPS)]
        logits = forced_logits(
            self.engine,
            [
                (prompt(row) + self.exact[row].tokens[: at % STEPS], None if row == BASE else row)
                for at, row in enumerate(rows)
            ],
        )
        return dict(zip(ROWS, logits.view(len(ROWS), STEPS, -1), strict=True))

    def solo_logits(self, row: str) -> torch.Tensor:
        tokens = prompt(row) + self.exact[row].tokens
        name = None if row == BASE else row
        return torch.cat(
            [forced_logits(self.engine, [(tokens[: len(prompt(row)) + k], name)]) for k in range(STEPS)]
        )


@pytest.fixture(scope="module")
def case(
    tiny_model: Callable[[str], Path], adapter_store: Callable[[str], Path]
) -> Callable[[str, str], Case]:
    @functools.cache
    def exact(architecture: str) -> dict[str, Reference]:
        return {row: generate(reference(architecture, row, "float32"), prompt(row), STEPS) for row in ROWS}

    def reference(architecture: str, row: str, precision: str) -> torch.nn.Module:
        folder = None if row == BASE else adapter_store(architecture) / row
        return load_reference(tiny_model(architecture), folder, precision)

    @functools.cache
    def get(architecture: str, precision: str) -> Case:
        peers = {}
        if precision != "float32":
            for row in ROWS:
                model = reference(architecture, row, precision)
                peers[row] = forced(model, prompt(row), exact(architecture)[row].tokens)
        engine = make_engine(tiny_model(architecture), adapter_store(architecture), precision=precision)
        assert [i.problems for i in engine.adapters.registry.list() if i.problems] == []
        return Case(engine, exact(architecture), peers)

    return get


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_float32_gives_the_same_tokens(case: Callable[[str, str], Case], architecture: str, row: str) -> None:
    this = case(architecture, "float32")
    expected = this.exact[row]
    name = None if row == BASE else row
    assert run_greedy(this.engine, [greedy("solo", prompt(row), name, STEPS)]) == [expected.tokens]
    assert this.mixed_tokens[row] == expected.tokens
    assert (this.mixed_logits[row] - expected.logits).abs().max() < TOLERANCE
    assert (this.solo_logits(row) - expected.logits).abs().max() < TOLERANCE


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(
    ("architecture", "precision"),
    [*itertools.product(CONFIGS, ["bfloat16", "int8", "nf4", "fp4"]), ("llama", "float16")],
)
def test_other_precisions_are_as_near_as_peft(
    case: Callable[[str, str], Case], architecture: str, precision: str, row: str
) -> None:
    this = case(architecture, precision)
    exact = this.exact[row].logits
    theirs = this.peers[row] - exact
    gaps = exact.topk(2).values.diff(dim=-1).abs().squeeze(-1)
    for ours in (this.mixed_logits[row], this.solo_logits(row)):
        assert rms(ours - exact) <= ALLOWANCE * rms(theirs)
        differs = ours.argmax(-1) != exact.argmax(-1)
        assert (gaps[differs] < 2 * theirs.abs().amax(-1)[differs]).all()


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_adapter_differs_from_the_base_and_from_every_other(
    case: Callable[[str, str], Case], architecture: str
) -> None:
    this = case(architecture, "float32")
    same = prompt(BASE)
    logits = forced_logits(this.engine, [(same, None if row == BASE else row) for row in ROWS])
    distance = (logits[:, None] - logits[None]).abs().amax(-1)
    distance.fill_diagonal_(torch.inf)
    assert distance.min() > 10 * TOLERANCE


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
