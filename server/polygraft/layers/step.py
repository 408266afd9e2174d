"""What the layers know of the step that runs.

`model_runner` fills a plan for each step and hands it to the layers through one `StepContext` that they
share. Layers read tensors and flags of the plan, never a request or an adapter.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from polygraft.layers.native.structures import MAX_MODULES, PlanStruct, RowsStruct, SegmentStruct


@dataclass(slots=True)
class AttentionPlan:
    """Where the step's rows lie in the paged cache. All int32 but `slot_mapping` (int64).

    A sequence's keys are its shared prefix's, then its own; the last prefix block may be part full, and
    the sequence's own blocks start right after it.

    Args:
        slot_mapping: [rows] where each row's key goes: block * block_size + offset.
        query_start: [sequences + 1] first row of each sequence.
        context_lens: [sequences] keys visible to a sequence's last row, its prefix included.
        prefix_lens: [sequences] keys in shared prefix blocks.
        block_tables: [sequences, max_blocks] prefix blocks first, then the sequence's own.
        bare: uint8 [sequences, layers], 1 where a layer has nothing of the sequence's prefix: nobody has
            written its slots there. None if there is no such layer.
    """

    slot_mapping: torch.Tensor
    query_start: torch.Tensor
    context_lens: torch.Tensor
    prefix_lens: torch.Tensor
    block_tables: torch.Tensor
    bare: torch.Tensor | None = None
    _native: PlanStruct | None = None

    def native(self) -> PlanStruct:
        """The same for the C++ operators; valid as long as the plan."""
        if self._native is None:
            self._native = PlanStruct(
                self.slot_mapping.data_ptr(),
                self.query_start.data_ptr(),
                self.context_lens.data_ptr(),
                self.prefix_lens.data_ptr(),
                self.block_tables.data_ptr(),
                self.block_tables.shape[1],
                self.context_lens.shape[0],
                self.slot_mapping.shape[0],
                None if self.bare is None else self.bare.data_ptr(),
                0 if self.bare is None else self.bare.shape[1],
            )
        return self._native


class Segment(NamedTuple):
    """A run of neighbouring rows that use an adapter; native/side_path.h's `Segment`, field for field.

    Args:
        first, last: rows [first, last).
        weight: what the adapter adds is multiplied by it.
        offset: where in a row of the scratch its product with A goes: behind those of the adapters before it.
    """

    first: int
    last: int
    slot: int
    weight: float = 1.0
    offset: int = 0


SEGMENT = len(Segment._fields)
SEGMENT_DTYPE = np.dtype(SegmentStruct)
"""A row of a table of segments."""


def segment_table(segments: Sequence[Segment]) -> torch.Tensor:
    """int32 [n, SEGMENT], as the operators read them, the weight's bits as they are."""
    return table_of(np.array(segments, SEGMENT_DTYPE))


def table_of(rows: np.ndarray) -> torch.Tensor:
    """The same of an array [n] of `SEGMENT_DTYPE`."""
    return torch.from_numpy(rows.view(np.int32)).view(-1, SEGMENT)


class Depth(NamedTuple):
    """Segments that share no row.

    Args:
        table: their part of `Segments.table`.
        host: their part of `Segments.host`.
    """

    table: torch.Tensor
    host: list[Segment]


@dataclass(slots=True)
class Segments:
    """Which adapters a step's rows use; rows of no adapter are in none.

    A row of several adapters is in a segment of each, and they act in this order: each on the outputs that
    those before it have left.

    Args:
        table: int32 [n, 5] of segments, the weight's bits as they are; on CUDA cut into tiles of rows.
        host: whole segments, for the operators written in torch.
        touched: bit m is set if any of these adapters has a primitive in module m.
        max_rank: numbers that a row of the scratch needs for a module: the largest sum of ranks that a row's
            adapters have, with what the C++ operators keep beside x A^T (`LowRankSlots.scratch`).
        depths: the same again, a row's first adapters, then its second ones, and so on.
        max_width: the largest width of a bottleneck among them.
        site_floats: what a row needs of scratch at their sites.
    """

    table: torch.Tensor
    host: list[Segment]
    touched: int
    max_rank: int
    depths: tuple[Depth, ...] = ()
    max_width: int = 0
    site_floats: int = 0


NO_SEGMENTS = Segments(torch.zeros(0, SEGMENT, dtype=torch.int32), [], 0, 0)


@dataclass(slots=True)
class StepContext:
    """The plan of the running step, shared by all layers of one base model.

    Args:
        attention: None outside a step.
        segments: over all rows.
        head_segments: over the rows whose logits are computed; the output head sees no others.
        scratch: float32, at least rows * MAX_MODULES * max_rank, for products between A and B, and what the
            sites of bottlenecks need.
    """

    attention: AttentionPlan | None = None
    segments: Segments = field(default_factory=lambda: NO_SEGMENTS)
    head_segments: Segments = field(default_factory=lambda: NO_SEGMENTS)
    scratch: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    positions: tuple[torch.Tensor, torch.Tensor] | None = None
    """What `rows` was described with, or None before that."""
    head_dim: int = 0
    """Their width."""
    rows: RowsStruct = field(default_factory=RowsStruct)
    rows_address: int = field(init=False)
    _buffer: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    def __post_init__(self) -> None:
        self.rows_address = ctypes.addressof(self.rows)

    def begin(self, attention: AttentionPlan, segments: Segments, head_segments: Segments, rows: int) -> None:
        """Describe the step that is about to run."""
        self.attention, self.segments, self.head_segments = attention, segments, head_segments
        needed = rows * max(MAX_MODULES * segments.max_rank, segments.site_floats)
        if self.scratch.numel() < needed:
            self.scratch = torch.empty(needed)

    def describe_rows(self, positions: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Tell decoder layers of the step, and of (cos, sin), each [1, rows, head_dim] and contiguous."""
        assert self.attention is not None
        self.positions = cos, sin = positions
        self.head_dim = cos.shape[-1]
        rows, segments = self.rows, self.segments
        rows.cos, rows.sin = cos.data_ptr(), sin.data_ptr()
        rows.plan = ctypes.addressof(self.attention.native())
        rows.segments, rows.num_segments = segments.table.data_ptr(), len(segments.host)
        rows.scratch, rows.max_rank = self.scratch.data_ptr(), segments.max_rank
        rows.max_width = segments.max_width

    def buffer(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory that layers share for what their operators hand each other, at least so many elements."""
        if self._buffer.numel() < elements * dtype.itemsize:
            self._buffer = torch.empty(elements * dtype.itemsize, dtype=torch.uint8)
        return self._buffer

    def end(self) -> None:
        """Forget it, so that nothing of a finished step can be read by mistake."""
        self.attention, self.segments, self.head_segments = None, NO_SEGMENTS, NO_SEGMENTS
        self.positions = None
