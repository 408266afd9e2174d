"""Rotated and scaled inputs: in every operator, in modules that share their input, in order, and merged."""

from __future__ import annotations

import pytest
import torch

from polygraft.core.primitives import Kron, LowRank, Rotation, Scale
from tests.layers.served import MAKES, PACKED, Parts, Served, random

IN, WIDTHS = 64, (40, 24, 66)


def rotation(size: int, seed: int, *, shared: bool = False) -> Rotation:
    blocks = random(1 if shared else IN // size, size, size, seed=seed)
    return Rotation(torch.linalg.qr(blocks).Q)


def agree(served: Served, make: str, outs: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    """Rows of int8 are rounded by their own largest value: there they are compared by their size."""
    for out, expected in zip(outs, exact, strict=True):
        if make == "packed-int8":
            assert (out - expected).norm() < 0.02 * expected.norm()
        else:
            assert torch.allclose(out, expected, rtol=1e-4, atol=3e-4)


KINDS = {
    "one module": Parts(rotations={"m1": rotation(8, 1)}),
    "shared block": Parts(rotations={"m0": rotation(16, 2, shared=True)}),
    "one block": Parts(rotations={"m2": rotation(64, 3)}),
    "blocks of one": Parts(rotations={"m1": Rotation(random(64, 1, 1, seed=4))}),
    "each its own": Parts(rotations={"m0": rotation(4, 5), "m1": rotation(32, 6), "m2": rotation(8, 7)}),
    "scaled inputs": Parts(scales={"m0": Scale(input=random(IN, seed=8)), "m2": Scale(input=random(IN, seed=9))}),
    "both": Parts(
        {"m0": LowRank(random(5, IN, seed=10), random(40, 5, seed=11))},
        {"m0": Scale(random(IN, seed=12), random(40, seed=13), after_bias=True)},
        {"m0": Kron(random(5, 8, seed=14), random(8, 8, seed=15)), "m1": Kron(torch.eye(24, 1), torch.ones(1, IN))},
        {"m0": rotation(8, 16), "m1": rotation(16, 17)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("which", KINDS)
@pytest.mark.parametrize("make", MAKES)
def test_rows_of_a_segment_are_transformed_and_others_are_not(make: str, which: str) -> None:
    served, parts = Served(make, WIDTHS, IN), KINDS[which]
    slot = served.install(parts)
    other = served.install(Parts({"m1": LowRank(random(3, IN, seed=27), random(24, 3, seed=28))}))
    x = random(9, IN, seed=29)
    plain = served.run(x, [])
    outs = served.run(x, [(1, 4, slot), (5, 6, other), (6, 8, slot)])
    mine = [1, 2, 3, 6, 7]
    exact = served.expected(x[mine], parts)
    agree(served, make, [out[mine] for out in outs], exact)
    for out, own in zip(outs, plain, strict=True):
        assert torch.equal(out[[0, 4, 8]], own[[0, 4, 8]])
    changed = [(out[mine] - own[mine]).abs().max() > 1 for out, own in zip(outs, plain, strict=True)]
    assert changed == [name in {*parts.scales, *parts.rotations} for name in served.names]
    # A copy is in the base's type, so rows aren't rounded; modules that the adapter leaves alone have none.
    merged, touched = served.merged(slot, x[mine]), {*parts.scales, *parts.rotations, *parts.krons}
    agree(served, make, merged, exact)
    for name, out, expected in zip(served.names, merged, exact, strict=True):
        assert name not in touched or torch.allclose(out, expected, rtol=1e-4, atol=1e-3)
    served.bank.remove(slot)
    assert all(map(torch.equal, served.run(x, []), plain))


@pytest.mark.parametrize("make", MAKES)
def test_transforms_of_a_rows_adapters_act_in_their_order(make: str) -> None:
    served = Served(make, WIDTHS, IN)
    first, second = KINDS["each its own"], Parts(rotations={"m0": rotation(16, 31), "m2": rotation(32, 32)})
    scale, low = KINDS["scaled inputs"], KINDS["both"]
    a, b, c, d = (served.install(parts) for parts in (first, second, scale, low))
    x = random(10, IN, seed=33)
    outs = served.run(
        x, [(0, 4, a), (4, 7, b), (7, 10, c)], [(1, 4, b), (4, 5, a), (5, 7, c), (8, 10, d)], [(3, 4, c), (6, 7, a)]
    )  # fmt: skip
    for row, stack in (
        (0, [first]), (2, [first, second]), (3, [first, second, scale]), (4, [second, first]),
        (5, [second, scale]), (6, [second, scale, first]), (7, [scale]), (9, [scale, low]),
    ):  # fmt: skip
        agree(served, make, [out[[row]] for out in outs], served.expected(x[[row]], *stack))


@pytest.mark.parametrize("make", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_bitwise_the_same_whatever_its_neighbours_and_the_threads(
    make: str, dtype: torch.dtype
) -> None:
    served = Served(make, WIDTHS, IN, dtype)
    rotated, scaled = (served.install(KINDS[kind]) for kind in ("each its own", "scaled inputs"))
    x = random(230, IN, seed=35).to(dtype)
    runs = [(0, 100, rotated), (100, 105, scaled), (110, 230, rotated)]
    outs, before = [], torch.get_num_threads()
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        try:
            outs.append(served.run(x, runs))
        finally:
            torch.set_num_threads(before)
    assert all(all(map(torch.equal, outs[0], other)) for other in outs)
    for rows in (1, 7, 60):
        alone = served.run(x[-rows:].contiguous(), [(0, rows, rotated)])
        assert all(torch.equal(mine, all_rows[-rows:]) for mine, all_rows in zip(alone, outs[0], strict=True))
    bare = served.run(x, [])
    assert all(torch.equal(out[105:110], own[105:110]) for out, own in zip(outs[0], bare, strict=True))


@pytest.mark.parametrize("make", ["packed", "torch"])
def test_bfloat16(make: str) -> None:
    served = Served(make, WIDTHS, IN, torch.bfloat16)
    parts = KINDS["both"]
    x = random(9, IN, seed=9).bfloat16()
    slot = served.install(parts)
    for outs in (served.run(x, [(0, 9, slot)]), served.merged(slot, x)):
        for out, expected in zip(outs, served.expected(x, parts), strict=True):
            assert (out.float() - expected).norm() < 0.02 * expected.norm()


def test_an_odd_number_of_inputs_in_bfloat16() -> None:
    served = Served("packed", (10,), 15, torch.bfloat16)
    parts = Parts(rotations={"m0": Rotation(random(5, 3, 3, seed=1))})
    x = random(4, 15, seed=2).bfloat16()
    slot = served.install(parts)
    for (out,) in (served.run(x, [(0, 4, slot)]), served.merged(slot, x)):
        (expected,) = served.expected(x, parts)
        assert (out.float() - expected).norm() < 0.02 * expected.norm()


def test_nan_in_one_row_reaches_no_other() -> None:
    served = Served("packed", WIDTHS, IN)
    slot = served.install(KINDS["each its own"])
    x = random(6, IN, seed=9)
    x[2, 5] = torch.nan
    for out in served.run(x, [(0, 6, slot)]):
        assert out.isfinite().all(1).tolist() == [row != 2 for row in range(6)]
