"""Packs the base's weights into the memory layout in which this machine multiplies by them fastest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from polygraft.layers.fused import FusedRmsNorm
from polygraft.layers.linear.int8_linear import Int8Linear
from polygraft.layers.linear.linear import LinearGroup, PackedLinear, Quantization
from polygraft.layers.linear.memory import Arena, give_back
from polygraft.layers.linear.onednn_linear import OneDnnLinear, gains_by_onednn
from polygraft.layers.linear.wide_head import WideLinear
from polygraft.layers.native.kernels import DTYPES, Kernels
from polygraft.layers.native.structures import MAX_MODULES
from polygraft.layers.operators import operators_for

_MOST_TWICE = 2**28
"""Bytes of weights that may be in memory twice while they are moved."""


def pack_linears(
    model: nn.Module,
    groups: Iterable[Sequence[str]],
    quantization: Mapping[str, Quantization] = MappingProxyType({}),
    *,
    double: bool = True,
) -> int:
    """Replace plain linear modules in place.

    Modules that bitsandbytes has quantized stay as they are. An embedding that is tied to the head keeps its
    own copy of the weight. The head's outputs are float32 from here on, whatever computes them.

    Args:
        groups: names of modules that read the same input.
        quantization: by module name; modules without an entry aren't quantized. 4 bits need the C++
            operators.
        double: whether the scales of 4-bit weights are quantized as well.

    Returns:
        How many modules were replaced.
    """
    head = _head(model)
    packed = 0
    for names in groups:
        alike: dict[tuple[torch.dtype, Quantization, bool], list[str]] = {}
        for name in names:
            module = model.get_submodule(name)
            if not _is_plain(module):
                continue
            weight, bias = _weight_and_bias(module)
            operators = operators_for(weight.device)
            if not operators.packs or weight.dtype not in DTYPES:
                continue
            how = quantization.get(name, "none")
            # oneDNN rounds products of 16-bit operands to 16 bits, and the head's sums must stay in float32.
            wide = name == head and weight.dtype != torch.float32
            kernels = operators.kernels
            if kernels is None:
                replacement = _by_torch(weight, bias, how, wide=wide)
                if replacement is None:
                    continue
                model.set_submodule(name, replacement)
            else:
                alike.setdefault((weight.dtype, how, wide), []).append(name)
            packed += 1
        for (_, how, wide), same in alike.items():
            assert kernels is not None
            for at in range(0, len(same), MAX_MODULES):
                _pack_group(model, same[at : at + MAX_MODULES], kernels, how, double=double, wide=wide)
    if head is not None:
        _widen(model, head)
    return packed


def _by_torch(
    weight: torch.Tensor, bias: torch.Tensor | None, quantization: Quantization, *, wide: bool
) -> nn.Module | None:
    """Return a module that computes by torch's operators; None if it wouldn't be faster than the plain one.

    Args:
        wide: whether the outputs must be float32.
    """
    if quantization != "none":
        assert quantization == "int8"
        return Int8Linear(weight, bias, wide=wide)
    return OneDnnLinear(weight, bias) if gains_by_onednn(weight) and not wide else None


def _head(model: nn.Module) -> str | None:
    """Return the name of the module that computes the logits, or None."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return next((name for name, module in model.named_modules() if module is head), None)


def _widen(model: nn.Module, head: str) -> None:
    """Make a plain head return float32."""
    module = model.get_submodule(head)
    if type(module) is nn.Linear and module.weight.dtype in (torch.bfloat16, torch.float16):
        model.set_submodule(head, WideLinear(module))


def gather_weights(model: nn.Module) -> None:
    """Move the packed weights into one piece of memory, in the order in which a step reads them."""
    modules = [module for module in model.modules() if isinstance(module, PackedLinear)]
    groups = list(dict.fromkeys(module.group for module in modules))
    arena = Arena(tensor for group in groups for tensor in group.tensors)
    moved = 0
    for group in groups:
        group.move(arena.copy)
        moved += group.nbytes
        if moved > _MOST_TWICE:  # the heap still holds what has moved
            give_back()
            moved = 0


def own_parameters(model: nn.Module) -> None:
    """Copy the remaining parameters out of the checkpoint's memory mapping.

    A single mapped parameter keeps the whole file mapped. It then counts as the process's memory a second
    time, and overwriting the file would change the weights of a running server or kill it.
    """
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:  # bitsandbytes' parameters aren't mapped
            parameter.data = parameter.data.clone()


def count_quantized(model: nn.Module, names: Iterable[str]) -> int:
    """Count the named modules whose weights are quantized, by us or by bitsandbytes."""
    modules = map(model.get_submodule, names)
    return sum(
        isinstance(module, Int8Linear)
        or (isinstance(module, PackedLinear) and module.group.quantization != "none")
        or type(module).__module__.startswith("bitsandbytes.")
        for module in modules
    )


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights in memory: shared ones count once, and packed copies count too."""
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:  # bitsandbytes keeps the scales outside the parameter
            parts = [value for value in state.as_dict().values() if isinstance(value, torch.Tensor)]
            sizes.update((part.data_ptr(), part.nbytes) for part in parts)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            sizes[id(module.group)] = module.group.nbytes
        elif isinstance(module, FusedRmsNorm | Int8Linear | OneDnnLinear):
            sizes[id(module)] = module.nbytes
    return sum(sizes.values())


def _pack_group(
    model: nn.Module,
    names: Sequence[str],
    kernels: Kernels,
    quantization: Quantization,
    *,
    double: bool,
    wide: bool,
) -> None:
    weights, biases = zip(*(_weight_and_bias(model.get_submodule(name)) for name in names), strict=True)
    group = LinearGroup(weights, biases, kernels, quantization, double=double, wide=wide)
    for member, name in enumerate(names):
        model.set_submodule(name, PackedLinear(group, member))


def _is_plain(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, Conv1D)  # bitsandbytes' modules are subclasses


def _weight_and_bias(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[out_features, in_features], and [out_features] or None."""
    assert isinstance(module, nn.Linear | Conv1D)
    weight: torch.Tensor = module.weight.detach()
    bias: torch.Tensor | None = module.bias
    return weight.t() if isinstance(module, Conv1D) else weight, None if bias is None else bias.detach()
