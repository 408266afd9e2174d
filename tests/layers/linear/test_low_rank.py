"""The low-rank operator in C++ against the one in torch, and the bank that holds the weights."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polygraft.core.adapter_weights import ModuleChange, by_module
from polygraft.core.primitives import LowRank
from polygraft.layers.linear.low_rank import AdaptedLinear, LowRankSlots
from polygraft.layers.linear.low_rank_bank import LowRankBank, Run
from polygraft.layers.linear.packed_adapter import together
from polygraft.layers.native.kernels import load_kernels
from polygraft.layers.operators import operators_for
from polygraft.layers.step import AttentionPlan, StepContext

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]
PLAN = AttentionPlan(*[torch.zeros(1)] * 5)


class Two(nn.Module):
    """Two linear modules, the second one a head."""

    def __init__(self, width_in: int, width_out: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(width_in, width_out, dtype=dtype)
        self.head = nn.Linear(width_in, width_out, bias=False, dtype=dtype)


class Layers:
    """The same two modules twice, one with each make of the operator."""

    def __init__(self, width_in: int, width_out: int, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.bare = Two(width_in, width_out, dtype)
        self.banks: list[LowRankBank] = []
        self.models: list[Two] = []
        self.steps: list[StepContext] = []
        for native in (True, False):
            model, step = Two(width_in, width_out, dtype), StepContext()
            model.load_state_dict(self.bare.state_dict())
            self.banks.append(
                LowRankBank(
                    model,
                    {"first": False, "head": True},
                    step,
                    operators_for(torch.device("cpu"), native=native),
                )
            )
            self.models.append(model)
            self.steps.append(step)

    def install(self, **primitives: LowRank) -> int:
        slots = {bank.install(by_module(low_rank=primitives)) for bank in self.banks}
        assert len(slots) == 1
        return slots.pop()

    def remove(self, slot: int) -> None:
        for bank in self.banks:
            bank.remove(slot)

    def run(
        self, x: torch.Tensor, *depths: Sequence[Run], module: str = "first"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs of the C++ operator and of the one in torch."""
        outs = []
        for bank, model, step in zip(self.banks, self.models, self.steps, strict=True):
            step.begin(PLAN, bank.segments(*depths), bank.segments(*depths), len(x))
            with torch.inference_mode():
                outs.append(getattr(model, module)(x[None])[0])
            step.end()
        return outs[0], outs[1]


def weights(
    rank: int, width_in: int, width_out: int, dtype: torch.dtype, *, bias: bool, seed: int = 0
) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(rank, width_in, generator=generator).to(dtype) / width_in**0.5,
        torch.randn(width_out, rank, generator=generator).to(dtype) / max(rank, 1) ** 0.5,
        torch.randn(width_out, generator=generator) if bias else None,
        scaling=1.7 - seed,
    )


def cut(rows: int, slots: Sequence[int], seed: int) -> list[tuple[int, int, int]]:
    """Neighbouring runs of random lengths, some of them of the base (left out)."""
    generator = torch.Generator().manual_seed(seed)
    runs, row = [], 0
    for slot in [0, *slots, 0]:
        last = min(rows, row + int(torch.randint(0, max(2, rows // len(slots)), (1,), generator=generator)))
        if slot and last > row:
            runs.append((row, last, slot))
        row = last
    return runs


@given(
    rows=st.integers(1, 200),
    ranks=st.lists(
        st.tuples(st.integers(1, 70) | st.sampled_from([16, 32, 64]), st.booleans()), min_size=1, max_size=6
    ),
    width_in=st.sampled_from([1, 3, 15, 16, 17, 40, 64, 100]),
    width_out=st.sampled_from([1, 5, 16, 63, 64, 65, 130, 300]),
    base=st.sampled_from(DTYPES),
    kept=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_the_two_operators_agree(
    rows: int,
    ranks: list[tuple[int, bool]],
    width_in: int,
    width_out: int,
    base: torch.dtype,
    kept: torch.dtype,
    seed: int,
) -> None:
    layers = Layers(width_in, width_out, base)
    slots = [
        layers.install(first=weights(rank, width_in, width_out, kept, bias=bias, seed=i))
        for i, (rank, bias) in enumerate(ranks)
    ]
    x = torch.randn(rows, width_in, generator=torch.Generator().manual_seed(seed)).to(base)
    runs = cut(rows, slots, seed)
    native, plain = layers.run(x, runs)
    bare = layers.bare.first(x)
    tolerance = 1e-4 if base == torch.float32 else 0.05
    assert torch.allclose(native.float(), plain.float(), atol=tolerance, rtol=tolerance)
    untouched = torch.ones(rows, dtype=torch.bool)
    for first, last, _ in runs:
        untouched[first:last] = False
    assert torch.equal(native[untouched], bare[untouched])


def test_against_the_formula() -> None:
    layers = Layers(24, 40)
    w = weights(6, 24, 40, torch.float32, bias=True)
    slot = layers.install(first=w)
    x = torch.randn(5, 24)
    assert w.bias is not None
    expected = layers.bare.first(x)
    expected[1:4] += x[1:4] @ w.product.T + w.bias
    for out in layers.run(x, [(1, 4, slot)]):
        assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_alone_and_among_others(dtype: torch.dtype) -> None:
    layers = Layers(100, 70, dtype)
    slots = [layers.install(first=weights(r, 100, 70, dtype, bias=False, seed=r)) for r in (3, 8, 17)]
    x = torch.randn(150, 100).to(dtype)
    runs = [(0, 1, slots[0]), (1, 80, slots[1]), (90, 150, slots[2])]
    side = [layers.run(x, runs)[0], layers.bare.first(x)]
    for first, last, slot in runs:
        for row in {first, (first + last) // 2, last - 1}:
            alone = layers.run(x[row : row + 1], [(0, 1, slot)])[0]
            # The base's own product may round otherwise for another number of rows.
            assert torch.allclose(alone[0].float(), side[0][row].float(), atol=1e-4, rtol=2**-6)


def test_bias_alone() -> None:
    layers = Layers(16, 20)
    bias = torch.randn(20)
    slot = layers.install(first=LowRank(torch.zeros(0, 16), torch.zeros(20, 0), bias))
    x = torch.randn(3, 16)
    for out in layers.run(x, [(0, 2, slot)]):
        assert torch.allclose(out[:2], layers.bare.first(x)[:2] + bias, atol=1e-6)
        assert torch.equal(out[2], layers.bare.first(x)[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_several_adapters_get_the_weighted_sum(dtype: torch.dtype) -> None:
    layers = Layers(40, 70, dtype)
    held = [weights(r, 40, 70, torch.float32, bias=r == 5, seed=r) for r in (5, 3, 18)]
    a, b, c = (layers.install(first=w) for w in held)
    x = torch.randn(12, 40).to(dtype)
    # Rows 0-1 are of a, 2-5 of a and b, 6-8 of a, b and c, 9 of the base, 10-11 of half of c and none of b.
    depths = [[(0, 9, a), (10, 12, c, 0.5)], [(2, 9, b, -1.5), (10, 12, b, 0.0)], [(6, 9, c, 2.0)]]
    expected = layers.bare.first(x).double()
    of = dict(zip((a, b, c), held, strict=True))
    for first, last, slot, *weight in (run for runs in depths for run in runs):
        w = of[slot]
        delta = x[first:last].double() @ w.product.double().T
        delta = delta if w.bias is None else delta + w.bias.double()
        expected[first:last] += (weight[0] if weight else 1.0) * delta
    tolerance = 1e-5 if dtype == torch.float32 else 0.06
    for out in layers.run(x, *depths):
        assert torch.allclose(out.double(), expected, atol=tolerance, rtol=tolerance)
    # Each row alone, and with a neighbour that has no adapter in common.
    for row, stack in [(0, [(a,)]), (3, [(a,), (b, -1.5)]), (7, [(a,), (b, -1.5), (c, 2.0)])]:
        alone = layers.run(x[row : row + 2], *([(0, 1, *member)] for member in stack))[0]
        assert torch.allclose(alone[0].float(), layers.run(x, *depths)[0][row].float(), atol=1e-5, rtol=2**-7)


def test_products_of_one_row_lie_behind_each_other() -> None:
    layers = Layers(16, 16)
    a, b, c = (layers.install(first=weights(r, 16, 16, torch.float32, bias=False)) for r in (2, 3, 7))
    segments = layers.banks[0].segments([(0, 4, a), (4, 9, c)], [(0, 2, b, 0.5), (5, 9, a)], [(6, 9, b)])
    assert [segment.offset for segment in segments.host] == [0, 0, 2, 7, 9]
    assert segments.max_rank == 12
    assert segments.table.shape == (5, 5)
    assert segments.table[:, :3].tolist() == [list(segment[:3]) for segment in segments.host]
    assert segments.table[:, 3].view(torch.float32).tolist() == [1.0, 1.0, 0.5, 1.0, 1.0]
    assert [len(depth.host) for depth in segments.depths] == [len(depth.table) for depth in segments.depths]
    nothing = layers.banks[0].segments()
    assert (nothing.host, nothing.touched, nothing.max_rank, len(nothing.table)) == ([], 0, 0, 0)


def test_a_module_without_weights_of_an_adapter_runs_the_base_alone() -> None:
    layers = Layers(32, 48)
    both = layers.install(
        first=weights(4, 32, 48, torch.float32, bias=False),
        head=weights(2, 32, 48, torch.float32, bias=False),
    )
    first = layers.install(first=weights(5, 32, 48, torch.float32, bias=False))
    x = torch.randn(6, 32)
    bare = layers.bare.head(x)
    for out in layers.run(x, [(0, 3, both), (3, 6, first)], module="head"):
        assert torch.equal(out[3:], bare[3:])
        assert (out[:3] - bare[:3]).abs().max() > 0.01
    # And where none has any, the operator isn't even called.
    segments = layers.banks[0].segments([(0, 6, first)])
    index = {name: slots.index for name, slots in layers.banks[0]._slots.items()}
    assert [segments.touched >> index[name] & 1 for name in ("first", "head")] == [1, 0]


def test_the_head_follows_its_own_segments() -> None:
    layers = Layers(16, 16)
    slot = layers.install(head=weights(2, 16, 16, torch.float32, bias=False))
    x = torch.randn(2, 16)
    for bank, model, step in zip(layers.banks, layers.models, layers.steps, strict=True):
        step.begin(PLAN, bank.segments([(5, 9, slot)]), bank.segments([(1, 2, slot)]), 9)
        out, bare = model.head(x[None])[0], layers.bare.head(x)
        assert torch.equal(out[0], bare[0])
        assert not torch.allclose(out[1], bare[1])
        step.end()
        assert torch.equal(model.head(x[None])[0], bare)


def test_a_slot_is_used_again_and_nothing_of_its_last_adapter_stays() -> None:
    layers = Layers(16, 24)
    old = layers.install(
        first=weights(9, 16, 24, torch.float32, bias=True),
        head=weights(9, 16, 24, torch.float32, bias=True),
    )
    other = layers.install(first=weights(3, 16, 24, torch.float32, bias=False, seed=1))
    layers.remove(old)
    fresh = weights(2, 16, 24, torch.float32, bias=False, seed=2)
    assert layers.install(first=fresh) == old
    assert all(bank.resident == 2 for bank in layers.banks)
    x = torch.randn(4, 16)
    for out in layers.run(x, [(0, 2, old), (2, 4, other)]):
        assert torch.allclose(out[:2], layers.bare.first(x[:2]) + x[:2] @ fresh.product.T, atol=1e-5)
    for out in layers.run(x, [(0, 4, old)], module="head"):
        assert torch.equal(out, layers.bare.head(x))


def test_the_bank_grows_and_those_it_holds_go_on() -> None:
    layers = Layers(20, 12)
    held = [weights(1 + i % 5, 20, 12, torch.float32, bias=i % 2 == 0, seed=i) for i in range(70)]
    slots = [layers.install(first=w) for w in held]
    assert len(set(slots)) == 70
    assert 0 not in slots
    x = torch.randn(70, 20)
    expected = layers.bare.first(x).detach()
    for row, w in enumerate(held):
        expected[row] += x[row] @ w.product.T
        if w.bias is not None:
            expected[row] += w.bias
    for out in layers.run(x, [(row, row + 1, slot) for row, slot in enumerate(slots)]):
        assert torch.allclose(out, expected, atol=1e-5)


def test_nan_in_one_segment_reaches_no_other() -> None:
    layers = Layers(16, 80)
    good = layers.install(first=weights(4, 16, 80, torch.float32, bias=False))
    bad = layers.install(first=LowRank(torch.full((4, 16), torch.nan), torch.zeros(80, 4)))
    x = torch.randn(6, 16)
    clean = layers.run(x, [(0, 2, good), (4, 6, good)])[0]
    for out in layers.run(x, [(0, 2, good), (2, 4, bad), (4, 6, good)]):
        assert out[2:4].isnan().all()
        assert torch.allclose(out[[0, 1, 4, 5]], clean[[0, 1, 4, 5]], atol=1e-6)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    layers = Layers(48, 700)
    slots = [layers.install(first=weights(r, 48, 700, torch.float32, bias=True, seed=r)) for r in (5, 66)]
    x = torch.randn(150, 48)
    outs = []
    before = torch.get_num_threads()
    for count in (2, threads):
        torch.set_num_threads(count)
        try:
            outs.append(side_path(layers, x, torch.zeros(150, 700), slots))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(*outs)


def test_inputs_that_arent_contiguous() -> None:
    layers = Layers(24, 30)
    slot = layers.install(first=weights(3, 24, 30, torch.float32, bias=False))
    x = torch.randn(24, 5).t()
    straight = side_path(layers, x.contiguous(), torch.zeros(5, 30), [slot])
    strided = side_path(layers, x, torch.zeros(30, 5).t(), [slot])
    assert torch.equal(straight, strided)


def side_path(layers: Layers, x: torch.Tensor, base: torch.Tensor, slots: list[int]) -> torch.Tensor:
    """The native side paths on top of a given product; the rows shared out evenly among the slots."""
    layer = layers.models[0].first
    assert isinstance(layer, AdaptedLinear)
    layer.base_layer = Given(base)
    share = len(x) // len(slots)
    runs = [(i * share, (i + 1) * share, slot) for i, slot in enumerate(slots)]
    layers.steps[0].begin(PLAN, layers.banks[0].segments(runs), layers.banks[0].segments([]), len(x))
    with torch.inference_mode():
        return layer(x)


class Given(nn.Module):
    """Answers with a given tensor."""

    def __init__(self, out: torch.Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out


def test_the_base_layers_attributes_show_through() -> None:
    layer = Layers(8, 6).models[0].first
    assert isinstance(layer, AdaptedLinear)
    assert (layer.in_features, layer.out_features, layer.weight.shape) == (8, 6, (6, 8))
    with pytest.raises(AttributeError):
        layer.nothing_like_that  # noqa: B018 - the access is the test


def test_an_adapter_lies_in_one_piece_of_memory() -> None:
    first = LowRank(torch.randn(3, 5), torch.randn(7, 3), torch.randn(7), scaling=2.5)
    second = LowRank(torch.randn(2, 5).bfloat16(), torch.randn(9, 2).bfloat16())
    slots = [LowRankSlots(n, 4, torch.device("cpu")) for n in range(2)]
    packed = [slots[0].pack(ModuleChange(first)), slots[1].pack(ModuleChange(second))]
    copies = together(packed)
    for one, copy in zip(packed, copies, strict=True):
        assert (copy.scaling, copy.scales_sum) == (one.scaling, one.scales_sum)
        for before, after in zip(one.tensors, copy.tensors, strict=True):
            assert (before is None) == (after is None)
            if before is not None and after is not None:
                assert torch.equal(before, after)
                assert after.is_contiguous()
                assert after.data_ptr() % 16 == 0
    tensors = [tensor for copy in copies for tensor in copy.tensors if tensor is not None]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert together([]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rank", "inputs", "in_panels"),
    [(16, 40, True), (48, 2, True), (8, 40, False), (24, 40, False), (16, 41, False)],
)
def test_an_a_that_fills_panels_lies_in_them_and_comes_back_as_it_was(
    rank: int, inputs: int, in_panels: bool, dtype: torch.dtype
) -> None:
    slots = LowRankSlots(0, 16, torch.device("cpu"))
    primitive = weights(rank, inputs, 24, dtype, bias=False)
    packed = slots.pack(ModuleChange(primitive))
    assert (packed.a_in_panels, packed.rank) == (in_panels, rank)
    assert torch.equal(packed.rows_of_a, primitive.a)
    x = torch.randn(3, inputs)
    expected = x @ primitive.product.t()
    assert torch.allclose(packed.applied(x, torch.zeros(3, 24), 1.0), expected, atol=1e-5)
