"""The low-rank weights of all resident adapters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from polygraft.adapters.primitives import LowRank
from polygraft.layers.linear import PackedLinear
from polygraft.layers.low_rank import ENTRY, AdaptedLinear, LowRankSlots
from polygraft.layers.native.kernels import load_kernels
from polygraft.layers.step import Segments, StepContext


class LowRankBank:
    """A slot for each resident adapter, over all modules of one base.

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
        self._tables = torch.zeros(len(modules), 0, ENTRY, dtype=torch.int64)
        for index, (name, is_head) in enumerate(modules.items()):
            slots = LowRankSlots(index, kernels.panel if kernels else 0)
            self._slots[name] = slots
            module = model.get_submodule(name)
            if kernels and isinstance(module, PackedLinear):
                module.group.attach(module.member, slots, step, is_head)
            else:
                model.set_submodule(name, AdaptedLinear(module, slots, step, is_head, kernels))
        self._grow(16)

    def _grow(self, capacity: int) -> None:
        grown = torch.zeros(len(self._slots), capacity, ENTRY, dtype=torch.int64)
        grown[:, : self._tables.shape[1]] = self._tables
        self._tables = grown
        for slots in self._slots.values():
            slots.move(grown[slots.index])

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
