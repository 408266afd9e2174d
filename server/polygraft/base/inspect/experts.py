"""Finds the modules of a base that hold the weights of several experts, each kind in one parameter of three
dimensions: what LoRA's `target_parameters` adapts.

They are known by what transformers notes in every module whose product can be exchanged
(transformers/integrations/moe.py, `use_experts_implementation`). A module counts only if the layers' own way
of computing it gives the same as the module does on random rows, so that no architecture is taken on trust.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from polygraft.base.inspect.agreement import agree, random_rows
from polygraft.core.spec import ExpertsShape
from polygraft.layers.experts.forward import experts_forward, up_name
from polygraft.layers.experts.pairs import pair_up

_NOTES = ("has_gate", "has_bias", "is_transposed", "num_experts")
_TOP = 2  # experts that a row is sent to when a module is tried


class WatchExperts:
    """While it is entered, notes which modules with experts a model calls, and with how many rows."""

    def __init__(self, model: nn.Module) -> None:
        self._shapes = {
            name: (module, shape)
            for name, module in model.named_modules()
            if (shape := _shape(module)) is not None
        }
        self._rows: dict[str, list[int]] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> WatchExperts:
        for name, (module, _) in self._shapes.items():
            self._watch(name, module)
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _watch(self, name: str, module: nn.Module) -> None:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            # Rows, the experts of each, and their weights, in this order and without names.
            fits = len(args) == 3 and all(isinstance(x, torch.Tensor) and x.dim() == 2 for x in args)
            self._rows.setdefault(name, []).append(len(args[0]) if fits else 0)

        self._hooks.append(module.register_forward_pre_hook(note))

    def found(self, rows: int) -> Mapping[str, ExpertsShape]:
        """Those that see every row of a step once, by name.

        Args:
            rows: how many the model was given.
        """
        return {
            name: shape
            for name, (module, shape) in self._shapes.items()
            if self._rows.get(name) == [rows] and _computed_alike(module, shape)
        }


def _shape(module: Any) -> ExpertsShape | None:
    """What a module holds, by its parameters and transformers' notes; None for any other."""
    # transformers 5.17 has neither parallel experts nor a norm behind them, and so doesn't note them.
    if not all(hasattr(module, note) for note in _NOTES) or getattr(module, "_is_expert_parallel", False):
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


def _computed_alike(module: nn.Module, shape: ExpertsShape) -> bool:
    """Whether the layers' way gives what the module does; without weights that can't be known."""
    weight = next(module.parameters())
    if weight.device.type == "meta":
        return True
    inputs, _ = shape.weights[up_name(module)]
    # The gate multiplies two of its numbers, which float16 doesn't hold for the largest rows.
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
