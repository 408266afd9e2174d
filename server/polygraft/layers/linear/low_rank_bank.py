"""The low-rank weights of all resident adapters."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import Dense, OnTrainedBias
from polygraft.core.tensor_tree import Copies
from polygraft.layers.linear.linear import PackedLinear
from polygraft.layers.linear.low_rank import AdaptedLinear, LowRankSlots
from polygraft.layers.linear.merging import AnyLinearSite, PackedSite, PlainSite
from polygraft.layers.linear.packed_adapter import together
from polygraft.layers.native.structures import ENTRY
from polygraft.layers.operators import Operators
from polygraft.layers.step import NO_SEGMENTS, Depth, Segment, Segments, StepContext, segment_table

Run = tuple[int, int, int] | tuple[int, int, int, float]
"""First row, last row + 1, slot, and a weight other than 1."""


class LowRankBank:
    """A slot for each resident adapter, over all modules of one base.

    Args:
        modules: the linear modules, and whether each is the head.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, bool],
        step: StepContext,
        operators: Operators,
    ) -> None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        kernels, self._triton = operators.kernels, operators.triton
        self._slots: dict[str, LowRankSlots] = {}
        self._touched: dict[int, int] = {}
        self._folded: dict[int, int] = {}
        """Modules by slot that only a merged copy changes."""
        self._ranks: dict[int, int] = {}
        self._free: list[int] = []
        self._sites: dict[str, AnyLinearSite] = {}
        self._tables = torch.zeros(len(modules), 0, ENTRY, dtype=torch.int64, device=device)
        for index, (name, is_head) in enumerate(modules.items()):
            module = model.get_submodule(name)
            packed = kernels is not None and isinstance(module, PackedLinear)
            bias = getattr(module, "bias", None)
            panel = kernels.panel if kernels else 0
            inputs = module.in_features if isinstance(module, PackedLinear) and packed else 0
            slots = LowRankSlots(index, panel, device, bias, bias_inside=not packed, rotated_inputs=inputs)
            self._slots[name] = slots
            if kernels and isinstance(module, PackedLinear):
                module.group.attach(module.member, slots, step, is_head)
                self._sites[name] = PackedSite(module.group, module.member, slots)
            else:
                adapted = AdaptedLinear(module, slots, step, is_head, operators)
                model.set_submodule(name, adapted)
                self._sites[name] = PlainSite(adapted)
        self._grow(16)

    def _grow(self, capacity: int) -> None:
        grown = self._tables.new_zeros(len(self._slots), capacity, ENTRY)
        grown[:, : self._tables.shape[1]] = self._tables
        self._tables = grown
        for slots in self._slots.values():
            slots.move(grown[slots.index])

    def install(self, modules: Mapping[str, ModuleChange]) -> int:
        """Take an adapter's changes of linear modules in, and return its slot.

        Slots count from 1, since 0 stands for the base.

        Args:
            modules: resolved against the base; modules that aren't in this bank are passed over.
        """
        changes = {name: change for name, change in modules.items() if name in self._slots}
        dense = {name: _only_dense(change) for name, change in changes.items() if change.dense is not None}
        slot = self._free.pop() if self._free else len(self._touched) + 1
        if slot >= self._tables.shape[1]:
            self._grow(2 * slot)
        touched = rank = 0
        names = [name for name in changes if name not in dense]
        weights = together([self._slots[name].pack(changes[name]) for name in names])
        for name, packed in zip(names, weights, strict=True):
            self._slots[name].install(slot, packed)
            touched |= 1 << self._slots[name].index
            rank = max(rank, packed.rank if self._triton else self._slots[name].scratch(packed))
        self._touched[slot] = touched
        self._folded[slot] = 0
        # Copies, so that nothing keeps the file's whole memory.
        copies = Copies(self._tables.device)
        for name, folded in dense.items():
            self._slots[name].install_dense(slot, copies.of(folded))
            self._folded[slot] |= 1 << self._slots[name].index
        self._ranks[slot] = rank
        return slot

    def remove(self, slot: int) -> None:
        """Let an adapter go; no step that uses it may be running."""
        touched = self._touched.pop(slot) | self._folded.pop(slot)
        del self._ranks[slot]
        for slots in self._slots.values():
            if touched >> slots.index & 1:
                slots.remove(slot)
        self._free.append(slot)

    def segments(self, *depths: Sequence[Run]) -> Segments:
        """Describe the adapters of a step's rows.

        Args:
            depths: the runs of rows' first adapters, then those of their second ones, and so on. A depth's
                runs are in the order of rows and share none; each lies in one of the depth before.
        """
        if not depths:
            return NO_SEGMENTS
        touched = rank = 0
        placed: list[list[Segment]] = []
        for runs in depths:
            above = placed[-1] if placed else []
            placed.append([self._placed(Segment(*run), above) for run in runs])
            for segment in placed[-1]:
                touched |= self._touched[segment.slot]
                rank = max(rank, segment.offset + self._ranks[segment.slot])
        cut = placed if self._triton is None else [self._triton.tiles(segments) for segments in placed]
        host = [segment for segments in placed for segment in segments]
        table = segment_table([segment for segments in cut for segment in segments]).to(self._tables.device)
        parts = torch.split(table, [len(segments) for segments in cut])
        return Segments(table, host, touched, rank, tuple(map(Depth, parts, placed)))

    def _placed(self, segment: Segment, above: Sequence[Segment]) -> Segment:
        """The segment behind the products of those of its rows that come before it."""
        if not above:
            return segment
        before = above[bisect.bisect_right(above, segment.first, key=lambda other: other.first) - 1]
        return segment._replace(offset=before.offset + self._ranks[before.slot])

    def site(self, name: str) -> AnyLinearSite:
        """Where one module's weights are."""
        return self._sites[name]

    def merge_sites(self, slot: int) -> list[AnyLinearSite]:
        """Where an adapter's weights can be folded into the base's."""
        touched = self._touched[slot] | self._folded[slot]
        return [site for site in self._sites.values() if touched >> site.slots.index & 1]

    @property
    def resident(self) -> int:
        """Adapters that hold a slot."""
        return len(self._touched)


def _only_dense(change: ModuleChange) -> Dense:
    """The dense change of a module, on the bias that was trained with it, if there is one."""
    assert change.dense is not None
    assert not {"low_rank", "scale", "kron", "rotation"} & change.parts.keys(), "dense changes are alone"
    return change.dense if change.bias is None else OnTrainedBias(change.dense, change.bias)
