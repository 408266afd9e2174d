"""Modules that read the same input, of any make, in a bank; and in float64 what adapters make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from polygraft.core.adapter_weights import by_module
from polygraft.core.primitives import Kron, LowRank, Rotation, Scale
from polygraft.layers.linear.linear import LinearGroup, PackedLinear, Quantization
from polygraft.layers.linear.low_rank_bank import LowRankBank, Run
from polygraft.layers.linear.merging import WeightSwitch, merge
from polygraft.layers.native.kernels import load_kernels
from polygraft.layers.operators import operators_for
from polygraft.layers.step import NO_SEGMENTS, AttentionPlan, StepContext

KERNELS = load_kernels()
EMPTY = torch.zeros(0, dtype=torch.int32)
NOWHERE = AttentionPlan(EMPTY.long(), EMPTY, EMPTY, EMPTY, EMPTY[None])
PACKED = {"packed": "none", "packed-int8": "int8", "packed-nf4": "nf4"}
MAKES = [*PACKED, "side-path", "torch"]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Parts:
    """What an adapter has, by the name of the module."""

    low_rank: dict[str, LowRank] = field(default_factory=dict)
    scales: dict[str, Scale] = field(default_factory=dict)
    krons: dict[str, Kron] = field(default_factory=dict)
    rotations: dict[str, Rotation] = field(default_factory=dict)


def turned(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """x times the blocks on a diagonal."""
    size = blocks.shape[-1]
    several = blocks.expand(x.shape[-1] // size, -1, -1) if len(blocks) == 1 else blocks
    return x @ torch.block_diag(*several).to(x)


class Served:
    """Modules "m0", "m1" and so on, with biases, whose inputs are the same."""

    def __init__(
        self, make: str, widths: Sequence[int], in_features: int, dtype: torch.dtype = torch.float32
    ) -> None:
        if make != "torch" and KERNELS is None:
            pytest.skip("no C++ compiler")
        self.names = [f"m{i}" for i in range(len(widths))]
        weights = [random(width, in_features, seed=i).to(dtype) for i, width in enumerate(widths)]
        self.biases = [random(width, seed=50 + i).to(dtype) for i, width in enumerate(widths)]
        self.model = nn.Module()
        self.model.anchor = nn.Parameter(torch.zeros(1))
        if make in PACKED:
            assert KERNELS is not None
            quantization: Quantization = PACKED[make]
            group = LinearGroup(weights, self.biases, KERNELS, quantization)
            weights = [group.unpacked(i) for i in range(len(widths))]
            for i, name in enumerate(self.names):
                self.model.add_module(name, PackedLinear(group, i))
        else:
            for name, weight, bias in zip(self.names, weights, self.biases, strict=True):
                layer = nn.Linear(in_features, len(weight), dtype=dtype)
                layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
                self.model.add_module(name, layer)
        self.weights = weights
        self.step = StepContext()
        self.bank = LowRankBank(
            self.model,
            dict.fromkeys(self.names, False),
            self.step,
            operators_for(torch.device("cpu"), native=make != "torch"),
        )

    def install(self, parts: Parts) -> int:
        changes = by_module(
            low_rank=parts.low_rank, scale=parts.scales, kron=parts.krons, rotation=parts.rotations
        )
        return self.bank.install(changes)

    def run(self, x: torch.Tensor, *depths: Sequence[Run]) -> list[torch.Tensor]:
        """Each module's outputs."""
        self.step.begin(NOWHERE, self.bank.segments(*depths), NO_SEGMENTS, len(x))
        with torch.inference_mode():
            outs = [self.model.get_submodule(name)(x) for name in self.names]
        self.step.end()
        return outs

    def merged(self, slot: int, x: torch.Tensor, *, requantize: bool = False) -> list[torch.Tensor]:
        """Each module's outputs by a copy with the adapter in it."""
        making = merge(self.bank.merge_sites(slot), slot, requantize=requantize)
        while True:
            try:
                next(making)
            except StopIteration as end:
                copy = end.value
                break
        switch = WeightSwitch()
        switch.use(copy)
        outs = self.run(x, [])
        switch.use(None)
        return outs

    def expected(self, x: torch.Tensor, *stack: Parts | tuple[Parts, float]) -> list[torch.Tensor]:
        """Each module's outputs for rows of these adapters, each with a weight, in their order."""
        outs = []
        parts = [one if isinstance(one, tuple) else (one, 1.0) for one in stack]
        for name, weight, bias in zip(self.names, self.weights, self.biases, strict=True):
            read = x.double()
            for one, _ in parts:
                if name in one.scales and one.scales[name].input is not None:
                    read = read * one.scales[name].input
                if name in one.rotations:
                    read = turned(read, one.rotations[name].blocks)
            out = read @ weight.double().T + bias.double()
            for one, factor in parts:
                if name in one.scales and one.scales[name].output is not None:
                    assert one.scales[name].after_bias
                    out = out * one.scales[name].output
                if name in one.krons:
                    kron = one.krons[name]
                    out = out + factor * (x.double() @ torch.kron(kron.w1, kron.w2).double().T)
                if name in one.low_rank:
                    low_rank = one.low_rank[name]
                    out = out + factor * (x.double() @ low_rank.product.double().T)
            outs.append(out.float())
        return outs
