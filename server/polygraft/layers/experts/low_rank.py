"""Low-rank weights of adapters for the experts of one parameter: `out += weight * scaling * (x A_e^T) B_e^T`.

The operators are those of linear modules' side paths (`low_rank.py`): what is a slot there is an adapter and
an expert here, and what is a row there is a pair of a row and an expert (`expert_pairs.py`).
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import nn

from polygraft.core.primitives import ExpertLowRank
from polygraft.layers.experts.pairs import ExpertPairs
from polygraft.layers.native.kernels import DTYPES, WEIGHT_DTYPES, Kernels
from polygraft.layers.native.structures import (
    ENTRY,
    MAX_MODULES,
    EntryStruct,
    GroupStruct,
    as_int64,
    entry_column,
)
from polygraft.layers.operators import Operators
from polygraft.layers.step import segment_table

if TYPE_CHECKING:
    from polygraft.layers.cuda.triton_side_path import TritonSidePath

_A, _B = entry_column("a"), entry_column("b")
_ALIGNMENT = 64  # bytes: a cache line; Triton's wide loads need 16


class ExpertSlots:
    """One parameter's low-rank weights by adapter and expert.

    Args:
        experts: how many the parameter holds.
        in_features, out_features: of one of them.
        device: where weights and table are kept.
    """

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        operators: Operators,
        device: torch.device,
    ) -> None:
        self._experts = experts
        self._out_features = out_features
        self._kernels = operators.kernels
        self._triton = operators.triton
        self._device = device
        self._panel = self._kernels.panel if self._kernels else out_features
        self._table = torch.zeros(0, ENTRY, dtype=torch.int64, device=device)
        # By adapter: A and B, each with a row of bytes per expert, and the scaling.
        self._weights: dict[int, tuple[_Stacked, _Stacked, float]] = {}
        self._struct = GroupStruct(in_features=in_features, modules=1)
        self._struct.module[0].width = out_features
        self._out = ctypes.c_void_p()

    def reserve(self, numbers: int) -> None:
        """Have room for so many adapters, with weights here or not: the operators look for those of all."""
        rows = numbers * self._experts
        if rows > len(self._table):
            grown = self._table.new_zeros(max(rows, 2 * len(self._table)), ENTRY)
            grown[: len(self._table)] = self._table
            self._table = grown
            self._struct.module[0].table = grown.data_ptr()

    def install(self, number: int, primitive: ExpertLowRank) -> None:
        """Put an adapter's weights in.

        Args:
            number: the adapter's among those with weights on experts; there is room for it.
        """
        b = primitive.b.to(self._device)
        b = nn.functional.pad(b, (0, 0, 0, -self._out_features % self._panel))
        b = b.view(self._experts, -1, self._panel, primitive.rank).transpose(2, 3)
        stacked_a, stacked_b = _Stacked(primitive.a.to(self._device)), _Stacked(b)
        self._weights[number] = stacked_a, stacked_b, primitive.scaling
        dtype = WEIGHT_DTYPES[primitive.a.dtype]
        entry = EntryStruct(rank=primitive.rank, dtype=dtype, scaling=primitive.scaling)
        entries = as_int64(entry).repeat(self._experts, 1)
        entries[:, _A], entries[:, _B] = stacked_a.addresses(), stacked_b.addresses()
        self._own(number).copy_(entries)

    def remove(self, number: int) -> None:
        """Take an adapter's weights out; no step that uses them may be running."""
        if self._weights.pop(number, None) is not None:
            self._own(number).zero_()

    def _own(self, number: int) -> torch.Tensor:
        """An adapter's part of the table."""
        return self._table[number * self._experts : (number + 1) * self._experts]

    def holds(self, number: int) -> bool:
        """Whether an adapter has weights here."""
        return number in self._weights

    def delta(self, number: int, expert: int, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of B A with the scaling, float32 [rows, in_features], of one expert."""
        a, b, scaling = self._weights[number]
        return scaling * (self._columns_of_b(b, expert)[:, first:last].t() @ a.of(expert).float())

    def add(self, x: torch.Tensor, out: torch.Tensor, pairs: ExpertPairs) -> None:
        """Add the side paths of x [pairs, in_features] to out [pairs, out_features]."""
        if not any(map(len, pairs.depths)):
            return
        x = x.contiguous()
        assert out.is_contiguous()
        alike = out.dtype == x.dtype
        if self._triton is not None and alike and x.dtype in WEIGHT_DTYPES:
            self._add_triton(self._triton, x, out, pairs)
        elif self._kernels is not None and alike and x.dtype in DTYPES:
            self._add_native(self._kernels, x, out, pairs)
        else:
            self._add_torch(x, out, pairs)

    def _add_native(self, kernels: Kernels, x: torch.Tensor, out: torch.Tensor, pairs: ExpertPairs) -> None:
        table = pairs.table()
        scratch = torch.empty(len(x) * MAX_MODULES * pairs.max_rank)
        self._out.value = out.data_ptr()
        kernels.linear(
            DTYPES[x.dtype], DTYPES[x.dtype], ctypes.addressof(self._struct), x.data_ptr(), len(x),
            ctypes.addressof(self._out), table.data_ptr(), len(table), scratch.data_ptr(), pairs.max_rank,
            torch.get_num_threads(),
        )  # fmt: skip

    def _add_triton(
        self, triton: TritonSidePath, x: torch.Tensor, out: torch.Tensor, pairs: ExpertPairs
    ) -> None:
        for segments in pairs.segments():
            tiles = segment_table(triton.tiles(segments)).to(self._device)
            triton.add(x, out, self._table, tiles, pairs.max_rank)

    def _add_torch(self, x: torch.Tensor, out: torch.Tensor, pairs: ExpertPairs) -> None:
        for segments in pairs.segments():
            for first, last, slot, weight, _ in segments:
                number, expert = divmod(slot, self._experts)
                if number not in self._weights:
                    continue
                a, b, scaling = self._weights[number]
                h = weight * scaling * (x[first:last].float() @ a.of(expert).float().t())
                added = h @ self._columns_of_b(b, expert)
                out[first:last] = (out[first:last].float() + added).to(out.dtype)

    def _columns_of_b(self, b: _Stacked, expert: int) -> torch.Tensor:
        """B^T, float32 [rank, out_features]."""
        return b.of(expert).float().transpose(0, 1).flatten(1)[:, : self._out_features]


class _Stacked:
    """A copy of x [experts, ...] with each expert's part at an aligned address."""

    def __init__(self, x: torch.Tensor) -> None:
        self._shape = x.shape[1:]
        each = self._shape.numel()
        step = -(-each * x.itemsize // _ALIGNMENT) * _ALIGNMENT // x.itemsize
        self._rows = torch.zeros(len(x), step, dtype=x.dtype, device=x.device)
        self._rows[:, :each] = x.reshape(len(x), each)

    def of(self, expert: int) -> torch.Tensor:
        """One expert's part."""
        return self._rows[expert, : self._shape.numel()].view(self._shape)

    def addresses(self) -> torch.Tensor:
        """int64 [experts]"""
        step = self._rows.stride(0) * self._rows.itemsize
        return self._rows.data_ptr() + step * torch.arange(len(self._rows))
