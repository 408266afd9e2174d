"""Finds the modules of a base that choose experts by a weight of their own, which are no linear modules:
what LoRA's `target_parameters` adapts beside the experts.

A module counts if its weight has two dimensions, it reads a step's rows once and gives as many of everything,
and what it gives for some rows doesn't depend on the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from polygraft.core.spec import RouterShape

WEIGHT = "weight"


class WatchRouters:
    """While it is entered, notes what a model gives modules with a weight of two dimensions, and gets."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = {name: module for name, module in model.named_modules() if _may_be(module)}
        self._inputs: dict[str, list[torch.Tensor | None]] = {}
        self._outputs: dict[str, Any] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> WatchRouters:
        for name, module in self._modules.items():
            self._watch(name, module)
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _watch(self, name: str, module: nn.Module) -> None:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            x = args[0] if len(args) == 1 and not kwargs else None
            fits = isinstance(x, torch.Tensor) and (x.dim() == 2 or (x.dim() == 3 and len(x) == 1))
            rows = x.reshape(-1, x.shape[-1]) if isinstance(x, torch.Tensor) and fits else None
            self._inputs.setdefault(name, []).append(rows)
            self._outputs[name] = out

        self._hooks.append(module.register_forward_hook(note, with_kwargs=True))

    def found(self, rows: int) -> Mapping[str, RouterShape]:
        """Those that see every row of a step once, by name.

        Args:
            rows: how many the model was given.
        """
        found = {}
        for name, module in self._modules.items():
            inputs = self._inputs.get(name, [])
            if len(inputs) != 1 or inputs[0] is None or len(inputs[0]) != rows:
                continue
            if _by_row(module, inputs[0], self._outputs[name]):
                outs, ins = getattr(module, WEIGHT).shape
                found[name] = RouterShape(ins, outs)
        return found


def _may_be(module: nn.Module) -> bool:
    weight = dict(module.named_parameters(recurse=False)).get(WEIGHT)
    known = isinstance(module, nn.Linear | Conv1D | nn.Embedding)
    return not known and weight is not None and weight.dim() == 2 and weight.is_floating_point()


def _by_row(module: nn.Module, x: torch.Tensor, out: Any) -> bool:
    """Whether a module takes any number of rows, and some don't feel that others aren't numbers; the latter
    can't be told on meta."""
    whole, first, last = parts_of(out), 2, len(x) - 3
    try:
        with torch.inference_mode():
            some = parts_of(module(x[first:last]))
            others = x.clone()
            others[:first] = others[last:] = torch.nan
            beside = parts_of(module(others))
    except (RuntimeError, TypeError, ValueError):
        return False
    if not len(whole) == len(some) == len(beside) > 0:
        return False
    sizes = all(
        len(all_of) == len(x) and len(few) == last - first for all_of, few in zip(whole, some, strict=True)
    )
    return sizes and (
        x.device.type == "meta"
        or all(
            torch.equal(mine[first:last], theirs[first:last])
            for mine, theirs in zip(beside, whole, strict=True)
        )
    )


def parts_of(out: Any) -> tuple[torch.Tensor, ...]:
    """What a router gives, as tensors; none if it gives anything else."""
    parts = out if isinstance(out, tuple) else (out,)
    return parts if all(isinstance(part, torch.Tensor) and part.dim() for part in parts) else ()
