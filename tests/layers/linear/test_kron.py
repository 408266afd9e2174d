"""Kronecker products as side paths, in every operator, in both orders, beside others and merged."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import Kron, LowRank, Rotation
from polygraft.layers.linear.low_rank_bank import LowRankBank
from polygraft.layers.linear.packed_adapter import PackedAdapter
from tests.layers.served import MAKES, Parts, Served, random

IN, WIDTHS = 64, (40, 24, 66)
# (o1, i1) of the first factor. Where X W2^T is smaller than W1 X it comes first, else the other.
SHAPES = [(4, 8), (5, 2), (8, 4), (1, 1), (2, 64), (20, 1), (40, 64)]


def kron(width: int, first: tuple[int, int], seed: int, in_features: int = IN) -> Kron:
    o1, i1 = first
    return Kron(
        random(o1, i1, seed=seed) / i1**0.5, random(width // o1, in_features // i1, seed=seed + 1) / 3
    )


@pytest.mark.parametrize("first", SHAPES, ids=str)
@pytest.mark.parametrize("make", MAKES)
def test_rows_of_a_segment_gain_the_product(make: str, first: tuple[int, int]) -> None:
    served = Served(make, (40,), IN)
    parts = Parts(krons={"m0": kron(40, first, seed=3)})
    slot = served.install(parts)
    other = Parts({"m0": LowRank(random(3, IN, seed=7), random(40, 3, seed=8))})
    x = random(9, IN, seed=9)
    (plain,) = served.run(x, [])
    (out,) = served.run(x, [(1, 4, slot), (5, 6, served.install(other)), (6, 8, slot)])
    mine = [1, 2, 3, 6, 7]
    (base,), (expected,) = served.expected(x[mine]), served.expected(x[mine], parts)
    # What the base's own product differs by, quantized rows included, is no matter of the side path's.
    assert torch.allclose(out[mine] - plain[mine], expected - base, rtol=1e-4, atol=2e-4)
    assert (expected - base).abs().max() > 1
    assert torch.equal(out[[0, 4, 8]], plain[[0, 4, 8]])
    (merged,) = served.merged(slot, x[mine])
    assert torch.allclose(merged, expected, rtol=1e-4, atol=1e-3)
    served.bank.remove(slot)
    assert torch.equal(served.run(x, [])[0], plain)


@pytest.mark.parametrize("make", MAKES)
def test_weights_and_several_adapters_of_a_row(make: str) -> None:
    served = Served(make, WIDTHS, IN)
    low_rank = {name: LowRank(random(5, IN, seed=1), random(width, 5, seed=2)) for name, width in
                zip(served.names, WIDTHS, strict=True)}  # fmt: skip
    one = Parts(krons={"m0": kron(40, (4, 8), 3), "m2": kron(66, (6, 4), 5)})
    two = Parts({"m0": low_rank["m0"], "m1": low_rank["m1"]}, krons={"m0": kron(40, (8, 8), 7)})
    three = Parts({"m2": low_rank["m2"]})
    a, b, c = (served.install(parts) for parts in (one, two, three))
    x = random(8, IN, seed=9)
    outs = served.run(x, [(0, 5, a), (5, 8, b, -0.5)], [(2, 5, b, 2.0), (5, 7, a, 0.25)], [(3, 5, c)])
    plain, base = served.run(x, []), served.expected(x)
    for rows, stack in (
        ([0, 1], [one]),
        ([2], [one, (two, 2.0)]),
        ([3, 4], [one, (two, 2.0), three]),
        ([5, 6], [(two, -0.5), (one, 0.25)]),
        ([7], [(two, -0.5)]),
    ):
        for out, own, expected, exact in zip(
            outs, plain, served.expected(x[rows], *stack), base, strict=True
        ):
            gain = expected - exact[rows]
            assert torch.allclose(out[rows] - own[rows], gain, rtol=1e-4, atol=4e-4)


@given(
    rows=st.integers(1, 90),
    o1=st.sampled_from([1, 2, 5, 16, 33]),
    o2=st.sampled_from([1, 3, 15, 16, 17, 40]),
    i1=st.sampled_from([1, 2, 7, 16]),
    i2=st.sampled_from([1, 2, 8, 17, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(rows: int, o1: int, o2: int, i1: int, i2: int, dtype: torch.dtype) -> None:
    outs = []
    parts = Parts(krons={"m0": Kron(random(o1, i1, seed=1), random(o2, i2, seed=2))})
    x = random(rows, i1 * i2, seed=3).to(dtype)
    for make in ("packed", "torch"):
        served = Served(make, (o1 * o2,), i1 * i2, dtype)
        outs.append(served.run(x, [(0, rows, served.install(parts))])[0].float())
    (exact,) = served.expected(x, parts)
    unit = 2**-7 if dtype == torch.bfloat16 else 1e-5
    for out in outs:
        assert (out - exact).abs().max() <= unit * max(float(exact.abs().max()), 1.0)


@pytest.mark.parametrize("first", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_bitwise_the_same_whatever_the_number_of_rows(
    dtype: torch.dtype, first: tuple[int, int]
) -> None:
    served = Served("packed", (40,), IN, dtype)
    slot = served.install(Parts(krons={"m0": kron(40, first, seed=3)}))
    x = random(70, IN, seed=9).to(dtype)
    (together,) = served.run(x, [(0, 70, slot)])
    for rows in (1, 2, 3, 5, 13, 50):
        assert torch.equal(served.run(x[-rows:].contiguous(), [(0, rows, slot)])[0], together[-rows:])


def test_the_number_of_threads_changes_nothing() -> None:
    served = Served("packed", WIDTHS, IN)
    slot = served.install(Parts(krons={"m0": kron(40, (4, 8), 3), "m2": kron(66, (6, 4), 5)}))
    x, before, outs = random(200, IN, seed=9), torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            outs.append(served.run(x, [(0, 150, slot)]))
        finally:
            torch.set_num_threads(before)
    for several in zip(*outs, strict=True):
        assert all(torch.equal(several[0], other) for other in several)


def test_what_lies_between_the_products_is_small_whatever_the_shapes() -> None:
    # GPT-2's head: 29 times 1733 outputs. The other order would leave 24 * 1733 numbers for each row.
    wide = PackedAdapter(w1=torch.empty(29, 24), w2=torch.empty(32, 1733))
    assert wide.between == 29 * 32
    assert PackedAdapter(w1=torch.empty(32, 24), w2=torch.empty(24, 48)).between == 24 * 32
    assert PackedAdapter(a=torch.empty(5, 3)).between == 0


def test_it_names_and_counts_what_it_is_made_of() -> None:
    compiled = AdapterWeights(
        "lokr", 1, by_module(kron={"a": kron(40, (4, 8), 3)}, rotation={"b": Rotation(torch.zeros(16, 4, 4))})
    )
    assert compiled.primitives == ("kron", "rotation")
    assert (compiled.num_modules, compiled.rank, compiled.mergeable, compiled.in_bank) == (2, 0, True, True)
    assert compiled.compiled_bytes == 4 * (4 * 8 + 10 * 8 + 16 * 16)
    shapes = compiled.without_layer_weights()
    assert shapes.each("kron")["a"].w2.is_meta
    assert shapes.each("rotation")["b"].blocks.is_meta
    assert isinstance(Served("torch", (4,), 4).bank, LowRankBank)
