"""Low-rank side paths: any number of adapters and ranks in one step.

A step's rows lie grouped by adapter, so an adapter's rows are one segment `[first, last)` and the work is
`out[segment] += (x[segment] @ A.T) @ B.T` for each. Weights are never copied or padded: a module's table
holds the address and rank of each slot's weights, so the cost grows with the rows and ranks in the step
(Punica's segments, arXiv 2310.18547; S-LoRA's unpadded ranks, arXiv 2311.03285).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from polygraft.adapters.primitives import LowRank
from polygraft.layers.native.kernels import DTYPES, Kernels, load_kernels
from polygraft.layers.step import Segments, StepContext

_ENTRY = 5  # int64 fields of kernels.cpp's `Entry`


class LowRankSlots:
    """One module's low-rank weights by slot, and the operator that adds them.

    Args:
        index: the module's bit in `Segments.touched`.
        kernels: None runs the operator in torch.
    """

    table: torch.Tensor
    """int64 [slots, 5], this module's part of the bank's table."""

    def __init__(self, index: int, kernels: Kernels | None) -> None:
        self.index = index
        self.kernels = kernels
        self._weights: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = {}

    def install(self, slot: int, primitive: LowRank) -> None:
        """Put an adapter's weights into a slot."""
        a, b = primitive.a.contiguous(), primitive.b.t().contiguous()
        bias = None if primitive.bias is None else primitive.bias.float().contiguous()
        self._weights[slot] = (a, b, bias)
        address = 0 if bias is None else bias.data_ptr()
        self.table[slot] = torch.tensor(
            [a.data_ptr(), b.data_ptr(), address, primitive.rank, DTYPES.get(a.dtype, -1)]
        )

    def remove(self, slot: int) -> None:
        """Empty a slot; no step that uses it may be running."""
        if self._weights.pop(slot, None) is not None:
            self.table[slot] = 0

    def add(
        self, x: torch.Tensor, out: torch.Tensor, segments: Segments, scratch: torch.Tensor
    ) -> torch.Tensor:
        """Add every segment's side path.

        Args:
            x: [..., rows, in_features], the module's input.
            out: [..., rows, out_features], its output; changed in place where it is contiguous.
            scratch: float32 [rows, >= the largest rank].
        """
        out = out.contiguous()
        rows_in, rows_out = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        dtype = DTYPES.get(x.dtype)
        if self.kernels is None or dtype is None or x.device.type != "cpu" or out.dtype != x.dtype:
            self._add_torch(rows_in, rows_out, segments)
        else:
            rows_in = rows_in.contiguous()
            self.kernels.low_rank(
                dtype,
                rows_in.data_ptr(),
                rows_out.data_ptr(),
                rows_in.shape[1],
                rows_out.shape[1],
                segments.table.data_ptr(),
                len(segments.host),
                self.table.data_ptr(),
                scratch.data_ptr(),
                scratch.shape[1],
                torch.get_num_threads(),
            )
        return out

    def _add_torch(self, x: torch.Tensor, out: torch.Tensor, segments: Segments) -> None:
        for first, last, slot in segments.host:
            weights = self._weights.get(slot)
            if weights is None:
                continue
            a, b, bias = weights
            delta = (x[first:last].float() @ a.float().t()) @ b.float()
            if bias is not None:
                delta += bias
            out[first:last] = (out[first:last].float() + delta).to(out.dtype)


class AdaptedLinear(nn.Module):
    """A linear module of the base with the side paths of the step's adapters.

    Rows without an adapter, and steps without an adapter that has weights here, run the base alone.

    Args:
        base_layer: a module that maps [..., in_features] to [..., out_features], untouched.
        is_head: it sees only the rows whose logits are computed.
    """

    def __init__(self, base_layer: nn.Module, slots: LowRankSlots, step: StepContext, is_head: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.slots = slots
        self.step = step
        self.is_head = is_head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., rows, in_features] to [..., rows, out_features]."""
        out: torch.Tensor = self.base_layer(x)
        segments = self.step.head_segments if self.is_head else self.step.segments
        if segments.touched >> self.slots.index & 1:
            out = self.slots.add(x, out, segments, self.step.scratch)
        return out

    def __getattr__(self, name: str) -> Any:
        """The base layer's own attributes, for model code that reads `module.weight` and the like."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


class LowRankBank:
    """The low-rank weights of all resident adapters, over all modules of one base.

    Args:
        native: False runs the operators in torch, for tests and for comparing.
    """

    def __init__(
        self, model: nn.Module, modules: Mapping[str, bool], step: StepContext, native: bool
    ) -> None:
        kernels = load_kernels() if native else None
        self._slots: dict[str, LowRankSlots] = {}
        self._touched: dict[int, int] = {}
        self._ranks: dict[int, int] = {}
        self._free: list[int] = []
        self._tables = torch.zeros(len(modules), 0, _ENTRY, dtype=torch.int64)
        for index, (name, is_head) in enumerate(modules.items()):
            slots = LowRankSlots(index, kernels)
            self._slots[name] = slots
            parent, _, child = name.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, child, AdaptedLinear(getattr(owner, child), slots, step, is_head))
        self._grow(16)

    def _grow(self, capacity: int) -> None:
        grown = torch.zeros(len(self._slots), capacity, _ENTRY, dtype=torch.int64)
        grown[:, : self._tables.shape[1]] = self._tables
        self._tables = grown
        for slots in self._slots.values():
            slots.table = grown[slots.index]

    def install(self, primitives: Mapping[str, LowRank]) -> int:
        """Take an adapter in; returns its slot. Slots count from 1, since 0 stands for the base."""
        slot = self._free.pop() if self._free else len(self._touched) + 1
        if slot >= self._tables.shape[1]:
            self._grow(2 * slot)
        touched = 0
        for name, primitive in primitives.items():
            self._slots[name].install(slot, primitive)
            touched |= 1 << self._slots[name].index
        self._touched[slot] = touched
        self._ranks[slot] = max((primitive.rank for primitive in primitives.values()), default=0)
        return slot

    def remove(self, slot: int) -> None:
        """Let an adapter go; no step that uses it may be running."""
        touched = self._touched.pop(slot)
        del self._ranks[slot]
        for slots in self._slots.values():
            if touched >> slots.index & 1:
                slots.remove(slot)
        self._free.append(slot)

    def segments(self, runs: list[tuple[int, int, int]]) -> Segments:
        """Describe a step's rows by (first row, last row + 1, slot)."""
        touched = rank = 0
        for _, _, slot in runs:
            touched |= self._touched[slot]
            rank = max(rank, self._ranks[slot])
        return Segments(torch.tensor(runs, dtype=torch.int32).view(-1, 3), runs, touched, rank)

    @property
    def resident(self) -> int:
        """Adapters that hold a slot."""
        return len(self._touched)
