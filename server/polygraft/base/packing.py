"""Brings the base's weights into the order in which this machine multiplies by them fastest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from polygraft.layers.linear import LinearGroup, PackedLinear
from polygraft.layers.native.kernels import DTYPES, MAX_MODULES, Kernels, load_kernels
from polygraft.layers.onednn_linear import OneDnnLinear, gains_by_onednn


def pack_linears(model: nn.Module, groups: Iterable[Sequence[str]]) -> int:
    """Replace plain linear modules in place.

    Quantized modules stay as they are, and so does a tied partner: the embedding keeps its own copy.

    Args:
        groups: names of modules that read the same input.

    Returns:
        How many were replaced.
    """
    kernels = load_kernels()
    packed = 0
    for names in groups:
        alike: dict[torch.dtype, list[str]] = {}
        for name in names:
            module = model.get_submodule(name)
            if not _is_plain(module):
                continue
            weight, bias = _weight_and_bias(module)
            if kernels is None or _has_matrix_registers(weight):
                if gains_by_onednn(weight):
                    _replace(model, name, OneDnnLinear(weight, bias))
                    packed += 1
            elif weight.device.type == "cpu" and weight.dtype in DTYPES:
                alike.setdefault(weight.dtype, []).append(name)
        for same in alike.values():
            assert kernels is not None
            for at in range(0, len(same), MAX_MODULES):
                _pack_group(model, same[at : at + MAX_MODULES], kernels)
            packed += len(same)
    return packed


def own_parameters(model: nn.Module) -> None:
    """Copy the parameters that are left out of the checkpoint's file mapping.

    While one of them is mapped the whole file stays so: it counts as the process's memory a second time, and
    a file that is replaced in place would change or kill a running server.
    """
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:  # a quantized one isn't mapped, and its bytes aren't ours to move
            parameter.data = parameter.data.clone()


def _pack_group(model: nn.Module, names: Sequence[str], kernels: Kernels) -> None:
    weights, biases = zip(*(_weight_and_bias(model.get_submodule(name)) for name in names), strict=True)
    group = LinearGroup(weights, biases, kernels)
    for member, name in enumerate(names):
        _replace(model, name, PackedLinear(group, member))


def _is_plain(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, Conv1D)  # a quantized one is a subclass


def _weight_and_bias(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[out_features, in_features], and [out_features] or None."""
    assert isinstance(module, nn.Linear | Conv1D)
    weight: torch.Tensor = module.weight.detach()
    bias: torch.Tensor | None = module.bias
    return weight.t() if isinstance(module, Conv1D) else weight, None if bias is None else bias.detach()


def _has_matrix_registers(weight: torch.Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and bool(torch.cpu._is_amx_tile_supported())


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
