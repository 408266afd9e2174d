"""Weights in oneDNN's order give the products of the modules they replace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from polygraft.base.loader import load_base
from polygraft.base.packed_linear import PackedLinear, own_parameters, pack_linears


class Two(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(20, 33, dtype=dtype)
        self.conv = Conv1D(33, 20).to(dtype)
        nn.init.normal_(self.conv.bias)


@pytest.mark.parametrize("rows", [0, 1, 2, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear", "conv"])
def test_products_are_the_same(name: str, dtype: torch.dtype, rows: int) -> None:
    model = Two(dtype)
    x = torch.randn(1, rows, 20, dtype=dtype)
    with torch.inference_mode():
        expected = model.get_submodule(name)(x)
        assert pack_linears(model, [name]) == 1
        packed = model.get_submodule(name)
        assert isinstance(packed, PackedLinear)
        assert (packed.in_features, packed.out_features) == (20, 33)
        out = packed(x)
    assert out.shape == expected.shape
    assert out.dtype is dtype
    torch.testing.assert_close(out, expected)


def test_only_plain_modules_on_the_cpu_are_replaced() -> None:
    class Special(nn.Linear):
        """As quantized modules are."""

    model = nn.ModuleDict(
        {
            "special": Special(4, 4),
            "layer_norm": nn.LayerNorm(4),
            "of_float64": nn.Linear(4, 4, dtype=torch.float64),
            "on_meta": nn.Linear(4, 4, device="meta"),
        }
    )
    assert pack_linears(model, list(model)) == 0


def test_a_tied_embedding_keeps_its_weights_and_nothing_stays_mapped(llama: Path) -> None:
    base = load_base(str(llama))
    assert isinstance(base.model.get_output_embeddings(), PackedLinear)
    embedding = base.model.get_input_embeddings().weight
    assert embedding.shape == (base.spec.vocabulary_size, base.spec.hidden_size)
    mapped = Path("/proc/self/maps").read_text()
    assert str(llama / "model.safetensors") not in mapped


def test_owning_a_parameter_changes_no_value() -> None:
    model = Two(torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    own_parameters(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.data_ptr() != addresses[name]
