"""Finds the modules that choose experts by a weight of their own without being linear modules.

LoRA's `target_parameters` can adapt them, as it can the experts. A module counts if its weight has two
dimensions, one call gives it all rows of a step, it returns one result for each row, and no row's result
depends on the other rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from polygraft.base.inspect.trace import Trace
from polygraft.core.spec import RouterShape

WEIGHT = "weight"


def find_routers(trace: Trace, rows: int) -> Mapping[str, RouterShape]:
    """Return the routers that see every row of a step once, by module name.

    Args:
        rows: how many rows the traced forward had.
    """
    found = {}
    for name, module in trace.model.named_modules():
        calls = trace.calls_of(module) if _may_be_router(module) else ()
        if len(calls) != 1 or len(calls[0].args) != 1 or calls[0].kwargs:
            continue
        x = _as_rows(calls[0].input)
        if x is not None and len(x) == rows and _computes_by_row(module, x, calls[0].out):
            out_features, in_features = getattr(module, WEIGHT).shape
            found[name] = RouterShape(in_features, out_features)
    return found


def parts_of(out: Any) -> tuple[torch.Tensor, ...]:
    """Return a router's outputs as tensors; empty if one of them is no tensor with rows."""
    parts = out if isinstance(out, tuple) else (out,)
    return parts if all(isinstance(part, torch.Tensor) and part.dim() for part in parts) else ()


def _may_be_router(module: nn.Module) -> bool:
    weight = dict(module.named_parameters(recurse=False)).get(WEIGHT)
    known = isinstance(module, nn.Linear | Conv1D | nn.Embedding)
    return not known and weight is not None and weight.dim() == 2 and weight.is_floating_point()


def _as_rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """[rows, width] or [1, rows, width] to [rows, width]; None for any other shape."""
    if x is None or not (x.dim() == 2 or (x.dim() == 3 and len(x) == 1)):
        return None
    return x.reshape(-1, x.shape[-1])


def _computes_by_row(module: nn.Module, x: torch.Tensor, out: Any) -> bool:
    """Whether a module takes any number of rows, and NaN in other rows doesn't change a row.

    Tensors on meta have no values, so there only the numbers of rows are checked.

    Args:
        x: [rows, width].
        out: the module's output for them.
    """
    whole, first, last = parts_of(out), 2, len(x) - 3
    with_nan = x.clone()
    with_nan[:first] = with_nan[last:] = torch.nan
    try:
        with torch.inference_mode():
            fewer, among_nan = parts_of(module(x[first:last])), parts_of(module(with_nan))
    except (RuntimeError, TypeError, ValueError):
        return False
    if not len(whole) == len(fewer) == len(among_nan) > 0:
        return False
    if any(len(part) != len(x) for part in whole) or any(len(part) != last - first for part in fewer):
        return False
    return x.device.type == "meta" or all(
        torch.equal(mine[first:last], theirs[first:last])
        for mine, theirs in zip(among_nan, whole, strict=True)
    )
