"""Finds the modules that hold the weights of several experts in parameters of three dimensions.

LoRA's `target_parameters` adapts them. Transformers sets attributes that describe the layout on every module
whose computation can be exchanged (transformers/integrations/moe.py, `use_experts_implementation`). A module
counts only if `experts_forward` gives the same results as the module itself on random rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from polygraft.base.inspect.agreement import agree, random_rows
from polygraft.base.inspect.trace import Call, Trace
from polygraft.core.spec import ExpertsShape
from polygraft.layers.experts.forward import experts_forward, up_name
from polygraft.layers.experts.pairs import pair_up

_LAYOUT = ("has_gate", "has_bias", "is_transposed", "num_experts")
_TOP = 2  # experts of each random row


def find_experts(trace: Trace, rows: int) -> Mapping[str, ExpertsShape]:
    """Return the modules with experts that see every row of a step once, by module name.

    Args:
        rows: how many rows the traced forward had.
    """
    found = {}
    for name, module in trace.model.named_modules():
        shape = _shape(module)
        if shape is None or [_rows(call) for call in trace.calls_of(module)] != [rows]:
            continue
        if _agrees_with_ours(module, shape):
            found[name] = shape
    return found


def _rows(call: Call) -> int:
    """How many rows a call has; 0 unless its arguments are rows, their experts, and the experts' weights."""
    args = call.args
    fits = len(args) == 3 and all(isinstance(x, torch.Tensor) and x.dim() == 2 for x in args)
    return len(args[0]) if fits else 0


def _shape(module: Any) -> ExpertsShape | None:
    """The layout by a module's parameters and transformers' attributes; None for any other module."""
    # transformers 5.17 has no attributes for parallel experts and for a norm after the experts.
    if not all(hasattr(module, name) for name in _LAYOUT) or getattr(module, "_is_expert_parallel", False):
        return None
    up = up_name(module)
    parameters = dict(module.named_parameters(recurse=False))
    weights = {name: parameter for name, parameter in parameters.items() if name in (up, "down_proj")}
    stacked = all(
        parameter.dim() == 3 and len(parameter) == module.num_experts and parameter.is_floating_point()
        for parameter in weights.values()
    )
    if len(weights) != 2 or not stacked:
        return None
    transposed = bool(module.is_transposed)
    widths = {
        name: (weight.shape[1], weight.shape[2]) if transposed else (weight.shape[2], weight.shape[1])
        for name, weight in weights.items()
    }
    return ExpertsShape(module.num_experts, widths, transposed)


def _agrees_with_ours(module: nn.Module, shape: ExpertsShape) -> bool:
    """Whether `experts_forward` gives what the module does; weights on meta can't be checked and pass."""
    weight = next(module.parameters())
    if weight.device.type == "meta":
        return True
    inputs, _ = shape.weights[up_name(module)]
    # The gate multiplies two values, which would overflow float16 in the largest rows.
    x = (random_rows(inputs) / (100 if weight.dtype == torch.float16 else 1)).to(weight)
    top = min(_TOP, shape.experts)
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(len(x), shape.experts, generator=generator).topk(top).indices.to(x.device)
    weights = torch.rand(len(x), top, generator=generator).to(x)
    with torch.inference_mode():
        try:
            pairs = pair_up(index, shape.experts)
            return agree(experts_forward(module, x, weights, pairs), module(x, index, weights))
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError):
            return False
