"""Side paths inside modules with several experts, in every operator, against the formula in float64."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polygraft.base.inspect.experts import find_experts
from polygraft.base.inspect.trace import record
from polygraft.core.primitives import ExpertLowRank
from polygraft.layers import cuda
from polygraft.layers.experts.pairs import ExpertRuns, pair_up
from polygraft.layers.experts.sites import ExpertSites
from polygraft.layers.linear.merging import WeightSwitch, merge
from polygraft.layers.native.kernels import load_kernels
from polygraft.layers.operators import Operators
from polygraft.layers.step import NO_SEGMENTS, Segment, Segments, StepContext
from tests.layers.served import KERNELS, NOWHERE, random

# Rows of 16 bytes, which grouped products want; no whole panels.
EXPERTS, HIDDEN, MIDDLE, TOP = 5, 24, 40, 2
NAME = "layer.experts"


class Experts(nn.Module):
    """A module as transformers makes them, with the product written out for one row and one expert at a time."""

    def __init__(
        self,
        *,
        transposed: bool = False,
        gated: bool = True,
        biased: bool = False,
        normed: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.is_transposed, self.has_gate, self.has_bias = transposed, gated, biased
        self.has_post_expert_norm = normed
        self._is_expert_parallel = False
        self.up = "gate_up_proj" if gated else "up_proj"
        sizes = {self.up: (HIDDEN, 2 * MIDDLE if gated else MIDDLE), "down_proj": (MIDDLE, HIDDEN)}
        for at, (name, (inputs, outputs)) in enumerate(sizes.items()):
            shape = (EXPERTS, inputs, outputs) if transposed else (EXPERTS, outputs, inputs)
            setattr(self, name, nn.Parameter((random(*shape, seed=at) / 5).to(dtype), requires_grad=False))
            if biased:
                bias = random(EXPERTS, outputs, seed=10 + at).to(dtype)
                setattr(self, f"{name}_bias", nn.Parameter(bias, requires_grad=False))

    def act_fn(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x)

    def _apply_gate(self, x: torch.Tensor) -> torch.Tensor:
        # Interleaved, as GPT-OSS has them.
        return self.act_fn(x[..., ::2]) * (x[..., 1::2] + 1)

    def post_expert_norm(self, x: torch.Tensor) -> torch.Tensor:
        return x / (1 + x.abs().mean(-1, keepdim=True))

    def forward(
        self,
        x: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        stacks: Sequence[Sequence[tuple[Mapping[str, ExpertLowRank], float]]] = (),
    ) -> torch.Tensor:
        """Args: stacks: adapters with weights for each row."""
        out = []
        for at, row in enumerate(x.double()):
            total = torch.zeros(HIDDEN, dtype=torch.double)
            for expert, weight in zip(index[at].tolist(), weights[at].double(), strict=True):
                y = row
                for name in (self.up, "down_proj"):
                    matrix = getattr(self, name)[expert].double()
                    matrix = matrix.t() if self.is_transposed else matrix
                    for adapter, factor in stacks[at] if stacks else ():
                        if f"{NAME}.{name}" in adapter:
                            one = adapter[f"{NAME}.{name}"]
                            matrix = (
                                matrix
                                + factor * one.scaling * one.b[expert].double() @ one.a[expert].double()
                            )
                    y = matrix @ y
                    if self.has_bias:
                        y = y + getattr(self, f"{name}_bias")[expert].double()
                    if name == self.up:
                        y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
                if getattr(self, "has_post_expert_norm", False):
                    y = self.post_expert_norm(y)
                total += weight * y
            out.append(total)
        return torch.stack(out).to(x.dtype)


SHAPES: dict[str, dict[str, Any]] = {
    "Mixtral's": {},
    "GPT-OSS'": {"transposed": True, "biased": True},
    "without a gate": {"gated": False},
    "with a norm behind each": {"normed": True, "biased": True},
}
OPERATORS = ["native", "torch"]


class Model(nn.Module):
    """What a base is for the layers; `device` as transformers' models have it."""

    device = torch.device("cpu")

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.layer = nn.Module()
        self.layer.experts = experts


class Served:
    """One module with its adapters."""

    def __init__(self, operators: str = "native", triton: Any = None, **shape: Any) -> None:
        if operators == "native" and KERNELS is None:
            pytest.skip("no C++ compiler")
        self.bare = Experts(**shape)
        served = Experts(**shape)
        self.model = Model(served)
        with record(self.model) as trace:
            served(*rows(3))
        self.shapes = find_experts(trace, 3)
        chosen = Operators(load_kernels() if operators == "native" else None, triton)
        self.step = StepContext()
        self.sites = ExpertSites(self.model, self.shapes, self.step, chosen, first_bit=3)
        self.own = served
        self.bits: dict[int, int] = {}
        self.adapters: dict[int, Mapping[str, ExpertLowRank]] = {}

    def install(self, adapter: Mapping[str, ExpertLowRank]) -> int:
        slot = 7 * len(self.bits) + 1
        self.bits[slot] = self.sites.install(slot, adapter)
        self.adapters[slot] = adapter
        return slot

    def remove(self, slot: int) -> None:
        self.sites.remove(slot)
        self.bits[slot] = 0

    def run(
        self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, *depths: Sequence[Segment]
    ) -> torch.Tensor:
        host = [segment for depth in depths for segment in depth]
        touched = 0
        for segment in host:
            touched |= self.bits.get(segment.slot, 0)
        segments = Segments(torch.zeros(0), host, touched, 0)
        self.step.begin(NOWHERE, segments, NO_SEGMENTS, len(x))
        with torch.inference_mode():
            out: torch.Tensor = self.own(x, index, weights)
        self.step.end()
        return out

    def expected(
        self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, *depths: Sequence[Segment]
    ) -> torch.Tensor:
        """In float64, row by row."""
        stacks: list[list[tuple[Mapping[str, ExpertLowRank], float]]] = [[] for _ in x]
        for segment in (segment for depth in depths for segment in depth):
            for row in range(segment.first, segment.last):
                stacks[row].append((self.adapters.get(segment.slot, {}), segment.weight))
        return self.bare(x, index, weights, stacks)


def rows(several: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, the experts of each, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(several, EXPERTS, generator=generator).topk(TOP).indices
    return random(several, HIDDEN, seed=seed + 1), index, torch.rand(several, TOP, generator=generator)


def adapter(
    rank: int,
    seed: int,
    names: Sequence[str] = ("up", "down"),
    *,
    gated: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, ExpertLowRank]:
    up = ("gate_up_proj", 2 * MIDDLE) if gated else ("up_proj", MIDDLE)
    sizes = {"up": (*up, HIDDEN), "down": ("down_proj", HIDDEN, MIDDLE)}
    found = {}
    for at, name in enumerate(names):
        parameter, outputs, inputs = sizes[name]
        a, b = (
            random(EXPERTS, rank, inputs, seed=seed + at),
            random(EXPERTS, outputs, rank, seed=seed + 5 + at),
        )
        found[f"{NAME}.{parameter}"] = ExpertLowRank((a / 4).to(dtype), (b / 4).to(dtype), scaling=0.7)
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operators", OPERATORS)
def test_rows_of_adapters_among_others(operators: str, shape: str) -> None:
    served = Served(operators, **SHAPES[shape])
    gated = SHAPES[shape].get("gated", True)
    one, two = adapter(3, 1, gated=gated), adapter(17, 2, ["down"], gated=gated)
    three = adapter(1, 3, ["up"], gated=gated)
    a, b, c = map(served.install, (one, two, three))
    batch = rows(23)
    depth = [Segment(1, 6, a), Segment(6, 7, b), Segment(9, 15, c), Segment(15, 16, 999), Segment(16, 23, a)]
    out, expected = served.run(*batch, depth), served.expected(*batch, depth)
    base = served.expected(*batch)
    assert (out - expected).abs().max() < 2e-5
    mine = [*range(1, 7), *range(9, 15), *range(16, 23)]
    assert (expected - base).abs().amax(1)[mine].min() > 0.01
    # Rows without an adapter have what they have without neighbours.
    assert (out - base).abs()[[0, 7, 8, 15]].max() < 1e-5
    # Only one of them is left, and another takes a free place.
    served.remove(b)
    depth = [Segment(0, 4, c), Segment(4, 9, b), Segment(9, 20, a)]
    del served.adapters[b]
    assert (served.run(*batch, depth) - served.expected(*batch, depth)).abs().max() < 2e-5
    depth = [Segment(0, 4, c), Segment(4, 20, served.install(adapter(5, 9, gated=gated)))]
    assert (served.run(*batch, depth) - served.expected(*batch, depth)).abs().max() < 2e-5


@pytest.mark.parametrize("operators", OPERATORS)
def test_several_adapters_of_a_row_and_weights(operators: str) -> None:
    served = Served(operators, **SHAPES["GPT-OSS'"])
    a, b = served.install(adapter(3, 1)), served.install(adapter(6, 2, ["up"]))
    c = served.install(adapter(2, 3, ["down"]))
    batch = rows(19)
    first = [Segment(0, 8, a), Segment(8, 12, b, -0.5), Segment(13, 19, c, 2.0)]
    second = [Segment(2, 8, b, 0.25), Segment(8, 11, c), Segment(13, 16, a)]
    third = [Segment(5, 8, c, -1.0), Segment(13, 14, b)]
    out = served.run(*batch, first, second, third)
    assert (out - served.expected(*batch, first, second, third)).abs().max() < 2e-5
    for without in ((first,), (first, second), (second, third)):
        assert (out - served.expected(*batch, *without)).abs().max() > 0.01


@settings(max_examples=40, deadline=None)
@given(
    several=st.integers(1, 60),
    ranks=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    weights=st.tuples(*[st.sampled_from([1.0, -0.5, 0.0])] * 2),
    cut=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    of=st.sampled_from([torch.float32, torch.bfloat16]),
    transposed=st.booleans(),
)
def test_any_mix(
    several: int,
    ranks: tuple[int, int],
    weights: tuple[float, float],
    cut: float,
    dtype: torch.dtype,
    of: torch.dtype,
    transposed: bool,
) -> None:
    """Of either type, adapters of either type, whatever the operators."""
    at = int(cut * several)
    x, index, share = rows(several, seed=several)
    for operators in OPERATORS:
        served = Served(operators, transposed=transposed, dtype=dtype)
        a, b = (served.install(adapter(rank, rank, dtype=of)) for rank in ranks)
        first = [
            Segment(*run) for run in ((0, at, a, weights[0]), (at, several, b, weights[1])) if run[1] > run[0]
        ]
        second = [Segment(at // 2, at, b, 0.5)] if at - at // 2 else []
        batch = x.to(dtype), index, share.to(dtype)
        out, expected = served.run(*batch, first, second), served.expected(*batch, first, second)
        allowed = 0.05 if dtype == torch.bfloat16 else 2e-5
        assert (out - expected).abs().max() <= allowed * max(1.0, float(expected.abs().max()))


def test_what_is_added_to_a_row_is_bitwise_the_same_whatever_its_neighbours() -> None:
    served = Served("native")
    a, b = served.install(adapter(7, 1)), served.install(adapter(4, 2))
    x, index, _ = rows(30)
    slots = served.sites._slots[f"{NAME}.gate_up_proj"]

    def added(depth: Sequence[Segment], first: int, last: int) -> torch.Tensor:
        """[last - first, TOP, outputs], by row and choice."""
        segments = Segments(torch.zeros(0), list(depth), 0, 0)
        runs = ExpertRuns.of(segments, served.sites._adapters, last - first, x.device)
        pairs = pair_up(index[first:last], EXPERTS, runs)
        out = torch.zeros(len(pairs.order), 2 * MIDDLE)
        slots.add(x[first:last][pairs.rows], out, pairs)
        by_row = torch.empty_like(out)
        by_row[pairs.order] = out
        return by_row.view(last - first, TOP, -1)

    together = added([Segment(0, 12, a), Segment(12, 30, b)], 0, 30)
    assert together.abs().amin(1).amax(-1).min() > 0
    for first, last in ((0, 1), (3, 4), (2, 9), (11, 12)):
        assert torch.equal(added([Segment(0, last - first, a)], first, last), together[first:last])
    assert torch.equal(added([Segment(0, 2, a), Segment(2, 7, b)], 10, 17), together[10:17])


def test_pairs_are_sorted_once_for_products_and_side_paths() -> None:
    index = torch.tensor([[1, 0], [2, 1], [1, 2], [0, 1], [1, 0]])
    host = [Segment(0, 2, 40), Segment(3, 5, 41, 0.5), Segment(3, 4, 40, 2.0)]
    runs = ExpertRuns.of(
        Segments(torch.zeros(0), host, 0, 0), {40: (0, 3), 41: (1, 5)}, 5, torch.device("cpu")
    )
    assert runs.of_row.tolist() == [1, 1, 0, 2, 3]
    assert runs.slots.tolist() == [[-1, 0, 1, 1], [-1, -1, 0, -1]]
    assert runs.max_rank == 8
    pairs = pair_up(index, 4, runs)
    assert pairs.experts.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2]
    assert pairs.rows.tolist() == [0, 3, 4, 2, 0, 1, 3, 4, 2, 1]
    assert pairs.ends.tolist() == [3, 8, 10, 10]
    assert pairs.segments() == [
        [
            Segment(0, 1, 0),
            Segment(1, 2, 4, 0.5),
            Segment(2, 3, 4, 0.5),
            Segment(4, 6, 1),
            Segment(6, 7, 5, 0.5),
            Segment(7, 8, 5, 0.5),
            Segment(9, 10, 2),
        ],
        [Segment(1, 2, 0, 2.0, 5), Segment(6, 7, 1, 2.0, 5)],
    ]
    plain = pair_up(index, 4)
    assert plain.experts.tolist() == pairs.experts.tolist()
    assert plain.ends.tolist() == pairs.ends.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_merged_copy(shape: str, dtype: torch.dtype) -> None:
    served = Served(**SHAPES[shape], dtype=dtype)
    one = adapter(3, 1, gated=SHAPES[shape].get("gated", True))
    slot, other = served.install(one), served.install(adapter(2, 8, ["down"]))
    assert [len(served.sites.merge_sites(s)) for s in (slot, other, 999)] == [2, 1, 0]
    making = merge(served.sites.merge_sites(slot), slot, requantize=False)
    while True:
        try:
            next(making)
        except StopIteration as end:
            copy = end.value
            break
    own = {name: getattr(served.own, name) for name in (served.own.up, "down_proj")}
    assert copy.nbytes == sum(weight.nbytes for weight in own.values())
    x, index, weights = rows(9)
    batch = x.to(dtype), index, weights.to(dtype)
    expected = served.expected(*batch, [Segment(0, 9, slot)])
    switch = WeightSwitch()
    switch.use(copy)
    out = served.run(*batch)
    assert (out - expected).abs().max() < (0.05 if dtype == torch.bfloat16 else 2e-5) * expected.abs().max()
    switch.use(None)
    assert all(getattr(served.own, name) is weight for name, weight in own.items())
    assert all(torch.equal(weight, getattr(served.bare, name)) for name, weight in own.items())
    assert (served.run(*batch) - expected).abs().max() > 0.05


def test_a_copy_is_rounded_once() -> None:
    served = Served(dtype=torch.bfloat16)
    one = adapter(3, 1, ["down"], dtype=torch.bfloat16)
    slot = served.install(one)
    [site] = served.sites.merge_sites(slot)
    making = site.merge(slot, requantize=False)
    while True:
        try:
            next(making)
        except StopIteration as end:
            part = end.value
            break
    low_rank = one[f"{NAME}.down_proj"]
    exact = served.bare.down_proj.float() + low_rank.scaling * low_rank.b.float() @ low_rank.a.float()
    assert torch.equal(part, exact.to(torch.bfloat16))


def test_a_module_that_computes_otherwise_isnt_taken() -> None:
    assert Served().shapes.keys() == {NAME}
    with pytest.MonkeyPatch.context() as patch:
        # What is noted beside it isn't what it does.
        patch.setattr(Experts, "forward", lambda self, x, index, weights: x * 1.01)
        assert not Served().shapes


@pytest.mark.parametrize("note", ["has_gate", "is_transposed", "num_experts"])
def test_a_module_without_transformers_notes_isnt_taken(note: str) -> None:
    experts = Experts()
    with record(Model(experts)) as trace:
        experts(*rows(3))
    delattr(experts, note)
    assert not find_experts(trace, 3)


def test_a_module_as_transformers_5_17_has_it_is_taken() -> None:
    experts = Experts()
    del experts.has_post_expert_norm
    del experts._is_expert_parallel
    x, index, weights = rows(3)
    with record(Model(experts)) as trace:
        experts(x, index, weights)
    assert find_experts(trace, 3).keys() == {NAME}


def test_a_module_that_is_called_otherwise_isnt_taken() -> None:
    experts = Experts()
    x, index, weights = rows(3)
    for calls in (0, 2):
        with record(Model(experts)) as trace:
            for _ in range(calls):
                experts(x, index, weights)
        assert not find_experts(trace, 3)
    with record(Model(experts)) as trace:
        experts(x, index, weights)
    assert not find_experts(trace, 4)
    assert find_experts(trace, 3).keys() == {NAME}


PACKAGES = Path(sys.prefix) / "triton"


@pytest.mark.skipif(
    not PACKAGES.is_dir() and importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
def test_the_triton_operators_under_the_interpreter() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PACKAGES)
        patch.setenv("TRITON_INTERPRET", "1")
        path = Path(cuda.__file__).with_name("triton_side_path.py")
        spec = importlib.util.spec_from_file_location("interpreted_for_experts", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        served = Served("torch", module.TritonSidePath())
        a, b = served.install(adapter(3, 1)), served.install(adapter(18, 2, ["down"]))
        batch = rows(40)
        first, second = [Segment(0, 30, a, 0.5), Segment(32, 40, b)], [Segment(10, 20, b, -1.0)]
        out = served.run(*batch, first, second)
        assert (out - served.expected(*batch, first, second)).abs().max() < 2e-5
