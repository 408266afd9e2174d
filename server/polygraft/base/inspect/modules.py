"""Finds a base's linear modules, norms and input embedding in a recorded forward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from polygraft.base.inspect.trace import Trace
from polygraft.core.spec import EmbeddingShape, LinearShape, NormShape


def find_linears(trace: Trace, head: nn.Module | None, rows: int) -> Mapping[str, LinearShape]:
    """Return the linear modules that one call gives all rows of a step, by name.

    Args:
        head: the module that computes the logits, and gets one row only.
        rows: how many rows the traced forward had.
    """
    linears = {}
    for name, module in trace.model.named_modules():
        features = _features(module)
        if features is None:
            continue
        seen = [_rows(call.input) for call in trace.calls_of(module)]
        if seen == [1 if module is head else rows]:
            linears[name] = LinearShape(*features, is_head=module is head, has_bias=_has_bias(module))
    return linears


def group_by_input(trace: Trace, names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Group modules, each called once, by the tensor that they read."""
    groups: dict[int, tuple[str, ...]] = {}
    for name in names:
        (call,) = trace.calls_of(trace.model.get_submodule(name))
        key = id(call.input)
        groups[key] = (*groups.get(key, ()), name)
    return tuple(groups.values())


def find_norms(trace: Trace, rows: int) -> Mapping[str, NormShape]:
    """Return the norms that one call gives all rows of a step, by name.

    Args:
        rows: how many rows the traced forward had.
    """
    norms = {}
    for name, module in trace.model.named_modules():
        calls = trace.calls_of(module) if _is_norm(module) else ()
        axis = _row_axis(calls[0].input, rows) if len(calls) == 1 else None
        if axis is not None:
            norms[name] = NormShape(len(module.weight), _has_bias(module), axis)
    return norms


def find_embedding(model: PreTrainedModel, trace: Trace, positions: torch.Tensor) -> EmbeddingShape | None:
    """Return the input embedding's shape; None if it isn't a plain table that is read once.

    Args:
        positions: the position ids of the traced forward.
    """
    table = model.get_input_embeddings()
    name = next((name for name, module in model.named_modules() if module is table), None)
    if not isinstance(table, nn.Embedding) or name is None or len(trace.calls_of(table)) != 1:
        return None
    head = model.get_output_embeddings()
    # Token ids may go through arithmetic before they reach another table. So each table that is at least half
    # as large as the vocabulary counts, unless it is read by positions.
    by_position = positions.untyped_storage()._cdata
    read_by_ids = any(
        call.input is None or call.input.untyped_storage()._cdata != by_position
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        and module is not table
        and 2 * module.num_embeddings >= table.num_embeddings
        for call in trace.calls_of(module)
    )
    return EmbeddingShape(
        name,
        table.num_embeddings,
        tied=head is not None and head.weight is table.weight,
        resizable=table.max_norm is None and not read_by_ids,
    )


def _features(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear module of any class; None for any other module."""
    if isinstance(module, nn.Linear):  # bitsandbytes' quantized ones are its subclasses
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


def _has_bias(module: nn.Module) -> bool:
    return getattr(module, "bias", None) is not None


def _rows(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.numel() // x.shape[-1]


def _is_norm(module: nn.Module) -> bool:
    """Whether a module's only parameters are a weight vector and perhaps a bias vector."""
    parameters = dict(module.named_parameters())
    return (
        type(module).__name__.endswith("Norm")
        and "weight" in parameters
        and parameters.keys() <= {"weight", "bias"}
        and all(parameter.dim() == 1 for parameter in parameters.values())
    )


def _row_axis(x: torch.Tensor | None, rows: int) -> int | None:
    """The axis of the rows in [1, rows, ...] or [1, heads, rows, ...]; None for any other shape."""
    if x is None or x.shape[0] != 1:
        return None
    axes = [axis for axis in range(1, x.dim() - 1) if x.shape[axis] == rows]
    return axes[0] if len(axes) == 1 else None
