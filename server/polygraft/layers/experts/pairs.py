"""Which experts a layer's rows go to, and with which adapters: one order for products and side paths.

A router sends each row to a few experts. The pairs of a row and an expert are sorted by the expert and then
by the adapters that act on the row. So an expert's pairs are neighbours, as the base's grouped products want
them, and so are those of one adapter and one expert, as side paths do: such a group is a segment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from polygraft.layers.segments import stretches
from polygraft.layers.step import SEGMENT_DTYPE, Segment, Segments, table_of


@dataclass(frozen=True, slots=True)
class ExpertRuns:
    """Which adapters with weights on experts act on a step's rows. Run 0 is of the rows without any.

    Args:
        of_row: int64 [rows], each row's run.
        slots: int [depths, runs], the adapter's number among those with weights on experts; -1 is none.
        weights: float32 [depths, runs], of what it adds.
        offsets: int [depths, runs], as `Segment` has it.
        max_rank: the largest sum of ranks that a row's adapters have.
    """

    of_row: torch.Tensor
    slots: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    offsets: npt.NDArray[np.int64]
    max_rank: int

    @classmethod
    def of(
        cls,
        segments: Segments,
        adapters: Mapping[int, tuple[int, int]],
        rows: int,
        device: torch.device,
    ) -> ExpertRuns:
        """Those of a step.

        Args:
            adapters: number and largest rank by slot of the bank.
        """
        found = stretches(segments.host, adapters)
        depths, runs = max((len(one.stack) for one in found), default=0), 1 + len(found)
        slots = np.full((depths, runs), -1)
        weights, offsets = np.zeros((depths, runs), np.float32), np.zeros((depths, runs), np.int64)
        of_row, max_rank = np.zeros(rows, np.int64), 0
        for run, (first, last, stack) in enumerate(found, 1):
            of_row[first:last] = run
            before = 0
            for depth, segment in enumerate(stack):
                slots[depth, run], rank = adapters[segment.slot]
                weights[depth, run], offsets[depth, run] = segment.weight, before
                before += rank
            max_rank = max(max_rank, before)
        return cls(torch.from_numpy(of_row).to(device), slots, weights, offsets, max_rank)


@dataclass(frozen=True, slots=True)
class ExpertPairs:
    """The pairs of a row and an expert of one layer.

    Args:
        several: experts that a row goes to.
        order: int64 [pairs], from their place among all rows' choices: row * several + choice.
        experts: int64 [pairs], ascending.
        ends: int32 [experts], where each expert's pairs end.
        depths: tables of segments [n] of `SEGMENT_DTYPE` over the pairs: the rows' first adapters, their
            second ones, and so on. A segment's slot is the adapter's number * experts + expert.
        max_rank: numbers that a pair needs for its products with A.
    """

    several: int
    order: torch.Tensor
    experts: torch.Tensor
    ends: torch.Tensor
    depths: tuple[np.ndarray, ...] = ()
    max_rank: int = 0

    @property
    def rows(self) -> torch.Tensor:
        """int64 [pairs], the row of each."""
        return self.order // self.several

    def table(self) -> torch.Tensor:
        """int32 [n, SEGMENT]: all segments, in the order in which they act."""
        return table_of(np.concatenate(self.depths))

    def segments(self) -> list[list[Segment]]:
        """The same for operators that want them one by one, by depth."""
        return [[Segment(*row) for row in depth.tolist()] for depth in self.depths]


def pair_up(index: torch.Tensor, experts: int, runs: ExpertRuns | None = None) -> ExpertPairs:
    """Sort a layer's pairs.

    Args:
        index: int64 [rows, several], the experts that each row goes to.
        experts: how many there are.
        runs: of these rows, if adapters act on them.
    """
    several = index.shape[1]
    if runs is None or not len(runs.slots):
        chosen, order = index.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(chosen, _each(experts, index.device), right=True)
        return ExpertPairs(several, order, chosen, ends.int())
    number = runs.slots.shape[1]
    key, order = (index * number + runs.of_row[:, None]).reshape(-1).sort(stable=True)
    groups, counts = torch.unique_consecutive(key, return_counts=True)
    chosen = key // number
    ends = torch.searchsorted(chosen, _each(experts, index.device), right=True)
    depths = _tables(groups.cpu().numpy(), counts.cpu().numpy(), experts, runs)
    return ExpertPairs(several, order, chosen, ends.int(), depths, runs.max_rank)


def _each(experts: int, device: torch.device) -> torch.Tensor:
    return torch.arange(experts, device=device)


def _tables(
    groups: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], experts: int, runs: ExpertRuns
) -> tuple[np.ndarray, ...]:
    """Segments for groups of pairs with one expert and one run each, by depth."""
    expert, run = np.divmod(groups, runs.slots.shape[1])
    last = counts.cumsum()
    tables = []
    for slots, weights, offsets in zip(runs.slots, runs.weights, runs.offsets, strict=True):
        there = slots[run] >= 0
        table = np.empty(int(there.sum()), SEGMENT_DTYPE)
        table["first"], table["last"] = (last - counts)[there], last[there]
        table["slot"] = (slots[run] * experts + expert)[there]
        table["weight"], table["offset"] = weights[run][there], offsets[run][there]
        tables.append(table)
    return tuple(tables)
