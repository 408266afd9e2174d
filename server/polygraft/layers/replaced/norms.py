"""Norms of the base for which adapters can have weights of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from polygraft.core.primitives import NormWeights
from polygraft.layers.fused import FusedRmsNorm
from polygraft.layers.native.structures import NormStruct
from polygraft.layers.step import StepContext


class AdaptedNorm(nn.Module):
    """A norm, and for the rows of some adapters the same norm with other weights.

    Args:
        base_layer: a norm of any make, untouched.
        index: the norm's bit in `Segments.touched`.
        axis: of the rows in what it reads: [1, rows, ..., width] or [1, heads, rows, width].
    """

    def __init__(self, base_layer: nn.Module, index: int, axis: int, step: StepContext) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.index = index
        self._axis = axis
        self._step = step
        # In a list each, so that torch doesn't take them for parts of the model.
        self._own: dict[int, list[nn.Module]] = {}
        self._struct = NormStruct()
        self._table = torch.zeros(0, dtype=torch.int64)

    def bind(self, struct: NormStruct) -> None:
        """Keep the table's address up to date where the C++ operator reads it."""
        self._struct = struct
        self._point()

    def _point(self) -> None:
        self._struct.table, self._struct.slots = self._table.data_ptr(), len(self._table)

    def install(self, slot: int, weights: NormWeights) -> None:
        """Put an adapter's weights into a slot."""
        if slot >= len(self._table):
            table = torch.zeros(max(16, 2 * slot), dtype=torch.int64)
            table[: len(self._table)] = self._table
            self._table = table
            self._point()
        if isinstance(self.base_layer, FusedRmsNorm):
            assert weights.weight is not None
            fused = self.base_layer.with_weight(weights.weight)
            self._own[slot] = [fused]
            self._table[slot] = fused.scale.data_ptr()
        else:
            self._own[slot] = [_WithWeights(self.base_layer, weights)]

    def remove(self, slot: int) -> None:
        """Empty a slot; no step that uses it may be running."""
        if self._own.pop(slot, None) is not None:
            self._table[slot] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of the shape that `axis` says, to the same."""
        out: torch.Tensor = self.base_layer(x)
        segments = self._step.segments
        if segments.touched >> self.index & 1:
            for first, last, slot, _, _ in segments.host:
                own = self._own.get(slot)
                if own is not None:
                    rows = x.narrow(self._axis, first, last - first)
                    out.narrow(self._axis, first, last - first).copy_(own[0](rows))
        return out

    def __getattr__(self, name: str) -> Any:
        """The base layer's own attributes, for model code that reads `module.weight` and the like."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


class _WithWeights(nn.Module):
    """A module's own code with other weights."""

    def __init__(self, module: nn.Module, weights: NormWeights) -> None:
        super().__init__()
        self._module = [module]
        given = {"weight": weights.weight, "bias": weights.bias}
        own = dict(module.named_parameters())
        self._weights = {name: w.to(own[name]).clone() for name, w in given.items() if w is not None}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the module's."""
        out: torch.Tensor = torch.func.functional_call(self._module[0], self._weights, (x,))
        return out
