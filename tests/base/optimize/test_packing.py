"""Weights packed for this machine give the products of the modules they replace."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from polygraft.base.loader import load_base
from polygraft.base.optimize.packing import own_parameters, pack_linears
from polygraft.layers import operators
from polygraft.layers.linear.linear import PackedLinear
from polygraft.layers.linear.onednn_linear import OneDnnLinear, gains_by_onednn
from polygraft.layers.native.kernels import load_kernels

KERNELS = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")


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
@pytest.mark.parametrize("make", [pytest.param(PackedLinear, marks=KERNELS), OneDnnLinear])
def test_products_are_the_same(
    monkeypatch: pytest.MonkeyPatch, make: type[nn.Module], name: str, dtype: torch.dtype, rows: int
) -> None:
    model = Two(dtype)
    x = torch.randn(1, rows, 20, dtype=dtype)
    if make is OneDnnLinear:
        monkeypatch.setattr(operators, "load_kernels", lambda: None)
        if not gains_by_onednn(x):
            pytest.skip("oneDNN has no product in bfloat16 on this CPU")
    with torch.inference_mode():
        expected = model.get_submodule(name)(x)
        assert pack_linears(model, [[name]]) == 1
        packed = model.get_submodule(name)
        assert isinstance(packed, make)
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
    assert pack_linears(model, [list(model)]) == 0


@KERNELS
def test_modules_that_read_the_same_input_share_a_group(llama: Path) -> None:
    base = load_base(str(llama))
    layer = base.model.get_submodule("model.layers.0")
    attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    groups = [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]
    for modules in groups:
        assert len({module.group for module in modules}) == 1
        assert modules[0].group.widths == [module.out_features for module in modules]
    assert len({modules[0].group for modules in groups}) == 4


@KERNELS
def test_a_group_takes_no_more_modules_than_the_operator() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(8, 3 + i) for i in range(9)])
    x = torch.randn(2, 8)
    with torch.inference_mode():
        expected = [module(x) for module in model]
        assert pack_linears(model, [[str(i) for i in range(9)]]) == 9
        assert [len(model[i].group.widths) for i in (0, 4, 8)] == [4, 4, 1]
        for module, out in zip(model, expected, strict=True):
            torch.testing.assert_close(module(x), out)


def test_a_tied_embedding_keeps_its_weights_and_nothing_stays_mapped(llama: Path, tmp_path: Path) -> None:
    # A copy: the reference libraries of other tests may still hold the shared folder mapped.
    folder = shutil.copytree(llama, tmp_path / "copy")
    base = load_base(str(folder))
    assert isinstance(base.model.get_output_embeddings(), PackedLinear | OneDnnLinear)
    embedding = base.model.get_input_embeddings().weight
    assert embedding.shape == (base.spec.vocabulary_size, base.spec.hidden_size)
    mapped = Path("/proc/self/maps").read_text()
    assert str(folder / "model.safetensors") not in mapped


def test_owning_a_parameter_changes_no_value() -> None:
    model = Two(torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    own_parameters(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.data_ptr() != addresses[name]
