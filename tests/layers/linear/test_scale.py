"""Scales on a module's input and output, in every operator, beside low-rank weights and merged."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from polygraft.adapters.resolve.base_weights import resolve_against_base
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import LowRank, Scale
from polygraft.layers.linear.linear import LinearGroup, PackedLinear
from polygraft.layers.linear.low_rank_bank import LowRankBank, Run
from polygraft.layers.linear.merging import WeightSwitch, merge
from polygraft.layers.native.kernels import load_kernels
from polygraft.layers.operators import operators_for
from polygraft.layers.step import NO_SEGMENTS, AttentionPlan, StepContext

KERNELS = load_kernels()
IN, OUT, ROWS = 48, 40, 9
EMPTY = torch.zeros(0, dtype=torch.int32)
NOWHERE = AttentionPlan(EMPTY.long(), EMPTY, EMPTY, EMPTY, EMPTY[None])
MAKES = ["packed", "packed-int8", "side-path", "torch"]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Served:
    """One module with a bias, of some make, in a bank."""

    def __init__(self, make: str, dtype: torch.dtype = torch.float32) -> None:
        if make != "torch" and KERNELS is None:
            pytest.skip("no C++ compiler")
        self.weight, self.bias = random(OUT, IN, seed=1).to(dtype), random(OUT, seed=2).to(dtype)
        self.model = nn.Module()
        self.model.anchor = nn.Parameter(torch.zeros(1))
        if make.startswith("packed"):
            assert KERNELS is not None
            group = LinearGroup(
                [self.weight], [self.bias], KERNELS, "int8" if make.endswith("int8") else "none"
            )
            self.model.layer = PackedLinear(group, 0)
            self.weight = group.unpacked(0)
        else:
            layer = nn.Linear(IN, OUT, dtype=dtype)
            layer.weight.data, layer.bias.data = self.weight.clone(), self.bias.clone()
            self.model.layer = layer
        self.step = StepContext()
        self.bank = LowRankBank(
            self.model,
            {"layer": False},
            self.step,
            operators_for(torch.device("cpu"), native=make != "torch"),
        )

    def run(self, x: torch.Tensor, *depths: Sequence[Run]) -> torch.Tensor:
        self.step.begin(NOWHERE, self.bank.segments(*depths), NO_SEGMENTS, len(x))
        with torch.inference_mode():
            out: torch.Tensor = self.model.layer(x)
        self.step.end()
        return out

    def merged(self, slot: int, x: torch.Tensor) -> torch.Tensor:
        making = merge(self.bank.merge_sites(slot), slot, requantize=False)
        while True:
            try:
                next(making)
            except StopIteration as end:
                copy = end.value
                break
        switch = WeightSwitch()
        switch.use(copy)
        out = self.run(x, [])
        switch.use(None)
        return out

    def expected(self, x: torch.Tensor, low_rank: LowRank | None, scale: Scale) -> torch.Tensor:
        x, bias = x.double(), self.bias.double()
        out = (x if scale.input is None else x * scale.input.double()) @ self.weight.double().T
        if scale.of_sum:
            assert scale.output is not None
            product = 0.0 if low_rank is None else x @ low_rank.product.double().T
            return ((out + product) * scale.output.double() + bias).float()
        if scale.output is not None:
            out = (
                (out + bias) * scale.output.double()
                if scale.after_bias
                else out * scale.output.double() + bias
            )
        else:
            out = out + bias
        if low_rank is not None:
            out = out + x @ low_rank.product.double().T
        return out.float()


SCALES = {
    "output before the bias": Scale(output=random(OUT, seed=3)),
    "output after the bias": Scale(output=random(OUT, seed=3), after_bias=True),
    "output with the low rank in it": Scale(output=random(OUT, seed=3), of_sum=True),
    "input": Scale(input=random(IN, seed=4)),
    "both": Scale(input=random(IN, seed=4), output=random(OUT, seed=3), after_bias=True),
}


@pytest.mark.parametrize("low_rank", [False, True], ids=["alone", "beside-low-rank"])
@pytest.mark.parametrize("scale", SCALES.values(), ids=list(SCALES))
@pytest.mark.parametrize("make", MAKES)
def test_rows_of_a_segment_are_scaled_and_others_are_not(make: str, scale: Scale, low_rank: bool) -> None:
    served = Served(make)
    weights = LowRank(random(5, IN, seed=5), random(OUT, 5, seed=6), scaling=0.3) if low_rank else None
    slot = served.bank.install(
        by_module(low_rank={"layer": weights} if weights else {}, scale={"layer": scale})
    )
    other = served.bank.install(
        by_module(low_rank={"layer": LowRank(random(3, IN, seed=7), random(OUT, 3, seed=8))})
    )
    x = random(ROWS, IN, seed=9)
    plain = served.run(x, [])
    out = served.run(x, [(1, 4, slot), (5, 6, other), (6, 8, slot)])
    mine = [1, 2, 3, 6, 7]
    # int8 rows are rounded by their own largest value, so against the exact product only the size is known.
    tolerance = 2e-4 if make != "packed-int8" else 0.6
    assert torch.allclose(out[mine], served.expected(x[mine], weights, scale), rtol=1e-4, atol=tolerance)
    assert torch.equal(out[[0, 4, 8]], plain[[0, 4, 8]])
    alone = served.run(x[6:8], [(0, 2, slot)])
    if make.startswith("packed"):
        assert torch.equal(alone, out[6:8])
    else:  # torch's own product rounds by the number of rows
        assert torch.allclose(alone, out[6:8], rtol=1e-4, atol=1e-4)
    merged = served.merged(slot, x[mine])
    assert torch.allclose(merged, served.expected(x[mine], weights, scale), rtol=1e-4, atol=1e-3)
    served.bank.remove(slot)
    assert torch.equal(served.run(x, []), plain)


@pytest.mark.parametrize("make", MAKES)
def test_several_adapters_of_a_row_act_in_their_order(make: str) -> None:
    served = Served(make)
    low_rank = LowRank(random(5, IN, seed=5), random(OUT, 5, seed=6))
    one, two = random(OUT, seed=3), random(OUT, seed=12)
    into = random(IN, seed=4)
    side = served.bank.install(by_module(low_rank={"layer": low_rank}))
    first = served.bank.install(by_module(scale={"layer": Scale(output=one, after_bias=True)}))
    second = served.bank.install(by_module(scale={"layer": Scale(output=two, input=into, after_bias=True)}))
    before = served.bank.install(by_module(scale={"layer": Scale(output=one)}))
    x = random(8, IN, seed=9)
    out = served.run(
        x,
        [(0, 2, side), (2, 6, first), (6, 8, before)],
        [(0, 2, first), (2, 4, second), (4, 6, side, 0.5), (6, 8, side, 2.0)],
    )
    plain = x.double() @ served.weight.double().T
    scaled = (x * into).double() @ served.weight.double().T
    delta = x.double() @ low_rank.product.double().T
    bias = served.bias.double()
    expected = torch.cat(
        [
            ((plain + bias + delta) * one)[:2],  # what was added before is scaled as well
            ((scaled + bias) * one * two)[2:4],  # the bias by both factors
            ((plain + bias) * one + 0.5 * delta)[4:6],
            (plain * one + bias + 2 * delta)[6:],
        ]
    ).float()
    tolerance = 2e-4 if make != "packed-int8" else 0.6
    assert torch.allclose(out, expected, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("make", ["packed", "torch"])
def test_bfloat16(make: str) -> None:
    served = Served(make, torch.bfloat16)
    scale = SCALES["both"]
    slot = served.bank.install(by_module(scale={"layer": scale}))
    x = random(ROWS, IN, seed=9).bfloat16()
    out = served.run(x, [(0, ROWS, slot)]).float()
    expected = served.expected(x, None, scale)
    assert (out - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("make", MAKES)
def test_a_magnitude_brings_each_row_to_its_norm(make: str) -> None:
    served = Served(make)
    magnitude = random(OUT, seed=11).abs() + 0.5
    weights = LowRank(random(5, IN, seed=5), random(OUT, 5, seed=6), magnitude=magnitude, scaling=1.9)
    compiled = AdapterWeights("lora", 1, by_module(low_rank={"layer": weights}))
    assert compiled.primitives == ("low_rank", "scale")
    resolving = resolve_against_base(compiled, served.bank)
    with pytest.raises(StopIteration) as end:
        while True:
            next(resolving)
    resolved = end.value.value
    slot = served.bank.install(resolved.modules)
    x = random(ROWS, IN, seed=9)
    whole = served.weight.double() + weights.product.double()
    whole = whole * (magnitude / whole.norm(dim=1))[:, None]
    expected = (x.double() @ whole.T + served.bias.double()).float()
    tolerance = 2e-4 if make != "packed-int8" else 0.1
    assert torch.allclose(served.run(x, [(0, ROWS, slot)]), expected, rtol=1e-4, atol=tolerance)
