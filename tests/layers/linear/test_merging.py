"""Merged weights are W + B A, whatever W is kept in; the switch changes nothing for good."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from polygraft.core.adapter_weights import by_module
from polygraft.core.primitives import LowRank
from polygraft.layers.linear.int8_linear import Int8Linear
from polygraft.layers.linear.linear import LinearGroup, PackedLinear
from polygraft.layers.linear.low_rank import AdaptedLinear
from polygraft.layers.linear.low_rank_bank import LowRankBank
from polygraft.layers.linear.merging import MergedWeights, WeightSwitch, dense_weight, merge
from polygraft.layers.linear.onednn_linear import OneDnnLinear
from polygraft.layers.native.kernels import load_kernels
from polygraft.layers.operators import TORCH, operators_for
from polygraft.layers.step import StepContext

KERNELS = load_kernels()
needs_compiler = pytest.mark.skipif(KERNELS is None, reason="no C++ compiler")
IN, WIDTHS = 128, (40, 16, 7)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Model(nn.Module):
    """A few linear modules, alone or in one group."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.anchor = nn.Parameter(torch.zeros(1))


def packed(dtype: torch.dtype, quantization: str, in_features: int = IN) -> Model:
    assert KERNELS is not None
    weights = [random(width, in_features, seed=i, dtype=dtype) for i, width in enumerate(WIDTHS)]
    biases = [random(WIDTHS[0], seed=9), None, None]
    group = LinearGroup(weights, biases, KERNELS, quantization)  # type: ignore[arg-type] # one of the four
    return Model({f"m{i}": PackedLinear(group, i) for i in range(len(WIDTHS))})


def adapter(
    model: nn.Module, names: tuple[str, ...], dtype: torch.dtype, *, bias: bool
) -> dict[str, LowRank]:
    assert KERNELS is not None
    primitives = {}
    for at, name in enumerate(names):
        rank = (5, 2 * KERNELS.panel)[at % 2]  # A as it is, and A in panels
        module = model.get_submodule(name)
        width, inputs = dense_weight(module).shape
        extra = random(width, seed=50 + at) if bias else None
        a = random(rank, inputs, seed=20 + at, dtype=dtype)
        b = random(width, rank, seed=30 + at, dtype=dtype)
        primitives[name] = LowRank(a, b, extra, scaling=1.3)
    return primitives


def run_merge(bank: LowRankBank, slot: int, *, requantize: bool = False) -> MergedWeights:
    making = merge(bank.merge_sites(slot), slot, requantize=requantize)
    while True:
        try:
            next(making)
        except StopIteration as end:
            merged: MergedWeights = end.value
            return merged


@needs_compiler
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantization", ["none", "int8", "nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_multiplies_by_the_sum_of_its_own_and_the_adapters_weights(
    dtype: torch.dtype, quantization: str, bias: bool
) -> None:
    model = packed(dtype, quantization)
    own = {f"m{i}": model.get_submodule(f"m{i}").weight for i in range(len(WIDTHS))}
    primitives = adapter(model, ("m0", "m2"), dtype, bias=bias)
    bank = LowRankBank(model, dict.fromkeys(own, False), StepContext(), operators_for(torch.device("cpu")))
    slot = bank.install(by_module(low_rank=primitives))
    x = random(3, IN, seed=70, dtype=dtype)
    before = [model.get_submodule(name)(x.clone()) for name in own]
    copy = run_merge(bank, slot)
    assert copy.nbytes <= sum(site.merged_bytes(requantize=False) for site in bank.merge_sites(slot))
    switch = WeightSwitch()
    assert switch.use(copy)
    assert not switch.use(copy)
    for name, plain in zip(own, before, strict=True):
        got = model.get_submodule(name)(x.clone())
        if name not in primitives:
            assert torch.equal(got, plain)
            continue
        p = primitives[name]
        # Of int8 weights the copy is no more: rows aren't rounded to int8 either.
        weight = (own[name].float() + p.product).to(dtype)
        expected = x.float() @ weight.float().t()
        if name == "m0":
            expected += random(WIDTHS[0], seed=9)
        if p.bias is not None:
            expected += p.bias
        tolerance = 2e-5 if dtype == torch.float32 else 8e-3
        assert torch.allclose(
            got.float(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
        )
    assert switch.use(None)
    for name, plain in zip(own, before, strict=True):
        assert torch.equal(model.get_submodule(name)(x.clone()), plain)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_odd_number_of_inputs(dtype: torch.dtype) -> None:
    model = packed(dtype, "none", in_features=33)
    own = model.get_submodule("m1").weight
    primitives = adapter(model, ("m1",), dtype, bias=False)
    bank = LowRankBank(model, {"m1": False}, StepContext(), operators_for(torch.device("cpu")))
    copy = run_merge(bank, bank.install(by_module(low_rank=primitives)))
    WeightSwitch().use(copy)
    p, x = primitives["m1"], random(2, 33, seed=71, dtype=dtype)
    weight = (own.float() + p.product).to(dtype)
    expected = x.float() @ weight.float().t()
    tolerance = 2e-5 if dtype == torch.float32 else 8e-3
    assert torch.allclose(model.get_submodule("m1")(x).float(), expected, rtol=tolerance, atol=10 * tolerance)


@needs_compiler
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_requantized_copies_are_small_and_near(quantization: str) -> None:
    model = packed(torch.float32, quantization)
    own = model.get_submodule("m0").weight
    primitives = adapter(model, ("m0",), torch.float32, bias=False)
    bank = LowRankBank(model, {"m0": False}, StepContext(), operators_for(torch.device("cpu")))
    slot = bank.install(by_module(low_rank=primitives))
    copy = run_merge(bank, slot, requantize=True)
    wide = run_merge(bank, slot)
    assert copy.nbytes < wide.nbytes / 3
    assert copy.nbytes <= bank.merge_sites(slot)[0].merged_bytes(requantize=True)
    p = primitives["m0"]
    exact = own + p.product
    WeightSwitch().use(copy)
    columns = model.get_submodule("m0")(torch.eye(IN)).t() - random(WIDTHS[0], seed=9)[:, None]
    error = (columns - exact).norm() / exact.norm()
    assert error < (0.02 if quantization == "int8" else 0.12)


@pytest.mark.parametrize("make", ["linear", "conv1d", "onednn", "int8"])
def test_modules_of_other_makes(make: str) -> None:
    weight, bias = random(24, 32, seed=1), random(24, seed=2)
    layer: nn.Module
    if make == "linear":
        layer = nn.Linear(32, 24)
        layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
    elif make == "conv1d":
        layer = Conv1D(24, 32)
        layer.weight.data, layer.bias.data = weight.t().contiguous(), bias.clone()
    elif make == "onednn":
        layer = OneDnnLinear(weight, bias)
    else:
        layer = Int8Linear(weight, bias)
    own = dense_weight(layer).clone()
    assert torch.allclose(own, weight, atol=1e-6 if make != "int8" else 0.02)
    model = Model({"m": layer})
    primitives = adapter(model, ("m",), torch.float32, bias=True)
    bank = LowRankBank(model, {"m": False}, StepContext(), TORCH)
    adapted = model.get_submodule("m")
    assert isinstance(adapted, AdaptedLinear)
    slot = bank.install(by_module(low_rank=primitives))
    x = random(3, 32, seed=5)
    with torch.inference_mode():
        before = adapted(x)
        copy = run_merge(bank, slot)
        assert copy.nbytes <= bank.merge_sites(slot)[0].merged_bytes(requantize=False)
        switch = WeightSwitch()
        switch.use(copy)
        p = primitives["m"]
        assert p.bias is not None
        expected = x @ (own + p.product).t() + bias + p.bias
        assert torch.allclose(adapted(x), expected, rtol=1e-4, atol=1e-4)
        switch.use(None)
        assert torch.equal(adapted(x), before)
    assert torch.equal(dense_weight(layer), own)
