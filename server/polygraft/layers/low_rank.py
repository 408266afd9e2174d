"""Low-rank side paths: any number of adapters and ranks in one step.

A step's rows lie grouped by adapter, so an adapter's rows are one segment `[first, last)` and the work is
`out[segment] += (x[segment] @ A.T) @ B.T` for each. Weights are never copied or padded: a module's table
holds the address and rank of each slot's weights, so the cost grows with the rows and ranks in the step
(Punica's segments, arXiv 2310.18547; S-LoRA's unpadded ranks, arXiv 2311.03285).
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from polygraft.adapters.primitives import LowRank
from polygraft.layers.native.kernels import DTYPES, Kernels
from polygraft.layers.native.structures import GroupStruct, ModuleStruct
from polygraft.layers.step import Segments, StepContext

if TYPE_CHECKING:
    from polygraft.layers.triton_side_path import TritonSidePath

ENTRY = 5  # int64 fields of side_path.h's `Entry`
# Codes in the table; the C++ operator knows the first two, Triton's all three.
WEIGHT_DTYPES = {**DTYPES, torch.float16: 2}

PackedLowRank = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""A [rank, in_features], B^T in panels [panels, rank, columns], bias float32 [columns of all panels]."""
_ALIGNMENT = 64  # bytes: a cache line; Triton's wide loads need 16


def together(adapter: Sequence[PackedLowRank]) -> list[PackedLowRank]:
    """Copies of an adapter's weights in one piece of memory.

    An adapter has hundreds of small tensors, which would come to lie between those of loads that are over:
    the heap would keep the holes.
    """
    tensors = [tensor for packed in adapter for tensor in packed if tensor is not None]
    sizes = (-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors)
    starts = list(itertools.accumulate(sizes, initial=0))
    memory = torch.empty(starts[-1], dtype=torch.uint8, device=tensors[0].device if tensors else None)

    # One view of the whole for each type: a view of a view keeps both, and there are hundreds.
    typed = {tensor.dtype: memory.view(tensor.dtype) for tensor in tensors}

    def copy(tensor: torch.Tensor, start: int) -> torch.Tensor:
        first = start // tensor.itemsize
        return typed[tensor.dtype][first : first + tensor.numel()].view(tensor.shape).copy_(tensor)

    copies = map(copy, tensors, starts)
    return [(next(copies), next(copies), None if bias is None else next(copies)) for _, _, bias in adapter]


class LowRankSlots:
    """One module's low-rank weights by slot.

    Args:
        index: the module's bit in `Segments.touched`.
        panel: columns in a panel of B; 0 keeps it in one.
        device: where weights and table are kept.
    """

    def __init__(self, index: int, panel: int, device: torch.device) -> None:
        self.index = index
        self._panel = panel
        self._device = device
        self._struct = ModuleStruct()
        self._table = torch.zeros(0, ENTRY, dtype=torch.int64)
        self._weights: dict[int, PackedLowRank] = {}

    def bind(self, struct: ModuleStruct) -> None:
        """Keep the table's address up to date where the C++ operator reads it."""
        self._struct = struct
        struct.table = self._table.data_ptr()

    def move(self, table: torch.Tensor) -> None:
        """Take over a table int64 [slots, 5] that holds what the last one did."""
        self._table = table
        self._struct.table = table.data_ptr()

    @property
    def table(self) -> torch.Tensor:
        """int64 [slots, 5] of (addresses of A, B^T in panels, float32 bias or 0; rank; type)."""
        return self._table

    def pack(self, primitive: LowRank) -> PackedLowRank:
        """An adapter's weights as the operators read them."""
        width = primitive.b.shape[0]
        panel = self._panel or width
        b = nn.functional.pad(primitive.b.to(self._device), (0, 0, 0, -width % panel))
        b = b.view(b.shape[0] // panel, panel, primitive.rank).transpose(1, 2)
        bias = primitive.bias
        if bias is not None:
            bias = nn.functional.pad(bias.to(self._device).float(), (0, -width % panel))
        return primitive.a.to(self._device), b, bias

    def install(self, slot: int, packed: PackedLowRank) -> None:
        """Put an adapter's weights into a slot; contiguous, and not to be moved."""
        a, b, bias = self._weights[slot] = packed
        address = 0 if bias is None else bias.data_ptr()
        self._table[slot] = torch.tensor(
            [a.data_ptr(), b.data_ptr(), address, a.shape[0], WEIGHT_DTYPES.get(a.dtype, -1)]
        )

    def bias(self, slot: int) -> torch.Tensor | None:
        """What an adapter adds to every row, float32 [columns of all panels]."""
        return self._weights[slot][2]

    def delta(self, slot: int, width: int) -> torch.Tensor:
        """What an adapter adds to the module's weight, float32 [width, in_features]."""
        a, b, _ = self._weights[slot]
        return b.float().transpose(0, 1).flatten(1)[:, :width].t() @ a.float()

    def remove(self, slot: int) -> None:
        """Empty a slot; no step that uses it may be running."""
        if self._weights.pop(slot, None) is not None:
            self._table[slot] = 0

    def add_torch(self, x: torch.Tensor, out: torch.Tensor, segments: Segments) -> None:
        """The operator in torch: out [rows, out_features] += the side paths of x [rows, in_features]."""
        for first, last, slot in segments.host:
            weights = self._weights.get(slot)
            if weights is None:
                continue
            a, b, bias = weights
            width = out.shape[-1]
            delta = (x[first:last].float() @ a.float().t()) @ b.float().transpose(0, 1).flatten(1)[:, :width]
            if bias is not None:
                delta += bias[:width]
            out[first:last] = (out[first:last].float() + delta).to(out.dtype)


class AdaptedLinear(nn.Module):
    """A linear module of any make with the side paths of the step's adapters.

    Rows without an adapter, and steps without an adapter that has weights here, run the base alone.

    Args:
        base_layer: a module that maps [..., in_features] to [..., out_features], untouched.
        is_head: it sees only the rows whose logits are computed.
        kernels: the operator in C++; without this and the next it runs in torch.
        triton: the operator in Triton.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        slots: LowRankSlots,
        step: StepContext,
        is_head: bool,
        kernels: Kernels | None,
        triton: TritonSidePath | None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.slots = slots
        self.step = step
        self.is_head = is_head
        self._kernels = kernels
        self._triton = triton
        self._struct = GroupStruct(modules=1)
        self._out = ctypes.c_void_p()
        slots.bind(self._struct.module[0])
        # In a tuple, so that torch doesn't take it for a part of the model.
        self._instead: tuple[nn.Module, ...] = ()

    def use(self, layer: nn.Module | None) -> None:
        """Run this layer from here on, None being the base's own."""
        self._instead = () if layer is None else (layer,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., rows, in_features] to [..., rows, out_features]."""
        layer = self._instead[0] if self._instead else self.base_layer
        out: torch.Tensor = layer(x)
        segments = self.step.head_segments if self.is_head else self.step.segments
        if segments.touched >> self.slots.index & 1:
            out = self._add(x, out.contiguous(), segments)
        return out

    def _add(self, x: torch.Tensor, out: torch.Tensor, segments: Segments) -> torch.Tensor:
        if self._triton is not None and x.dtype in WEIGHT_DTYPES and out.dtype == x.dtype:
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            self._triton.add(
                rows, out.view(-1, out.shape[-1]), self.slots.table, segments.table, segments.max_rank
            )
            return out
        dtype = DTYPES.get(x.dtype)
        if self._kernels is None or dtype is None or x.device.type != "cpu" or out.dtype != x.dtype:
            self.slots.add_torch(x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1]), segments)
            return out
        x = x.contiguous()
        self._struct.in_features, self._struct.module[0].width = x.shape[-1], out.shape[-1]
        self._out.value = out.data_ptr()
        self._kernels.linear(
            dtype, ctypes.addressof(self._struct), x.data_ptr(), x.shape[:-1].numel(),
            ctypes.addressof(self._out), segments.table.data_ptr(), len(segments.host),
            self.step.scratch.data_ptr(), segments.max_rank, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def __getattr__(self, name: str) -> Any:
        """The base layer's own attributes, for model code that reads `module.weight` and the like."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)
