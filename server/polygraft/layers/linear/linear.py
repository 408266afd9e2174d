"""Linear modules of the base whose products and side paths are one C++ operator.

Modules that read the same input, such as q, k and v, form a group: the first of them that is called computes
all, the others hand out what is there. `panels.py` says how their weights lie. The sums are in float32 (of
int8 weights, in whole numbers), and a row's result doesn't depend on the number of rows.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from polygraft.core.primitives import Dense
from polygraft.layers.linear.four_bit_panels import FourBitPanels
from polygraft.layers.linear.int8_panels import Int8Panels
from polygraft.layers.linear.low_rank import LowRankSlots
from polygraft.layers.linear.memory import Place
from polygraft.layers.linear.panels import Panels, pack, padded, unpack
from polygraft.layers.native.kernels import DTYPES, Kernels
from polygraft.layers.native.structures import MAX_MODULES, STORAGE, GroupStruct, WeightsStruct
from polygraft.layers.step import NO_SEGMENTS, StepContext

Quantization = Literal["none", "int8", "nf4", "fp4"]
_SLICE = 2**20
"""Weights that are merged at a stretch: about a millisecond's work."""
_DENSE_SLICE = 2**18
"""Likewise where the change is computed by torch, in several passes."""


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """What one module of a group can multiply by.

    Args:
        struct: linear.h's `Weights`, which points into `tensors`.
    """

    struct: WeightsStruct
    tensors: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that they take."""
        return sum(tensor.nbytes for tensor in self.tensors)


class LinearGroup:
    """Linear modules that read the same input.

    Args:
        weights: of 1 to MAX_MODULES modules [out_features, in_features], on the CPU, in one of float32 and
            bfloat16; not kept.
        biases: [out_features] each, or None.
        quantization: how the weights are kept.
        double: as `FourBitPanels` says.
        wide: outputs are float32, as the head's, rather than of the weights' type.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        kernels: Kernels,
        quantization: Quantization = "none",
        *,
        double: bool = True,
        wide: bool = False,
    ) -> None:
        self.dtype = weights[0].dtype
        self._out_dtype = torch.float32 if wide else self.dtype
        self.quantization = quantization
        self.in_features = weights[0].shape[1]
        self.widths = [weight.shape[0] for weight in weights]
        self._kernels = kernels
        self._double = double
        self._panels = self._pack(weights)
        self._biases = [None if bias is None else padded(bias.float(), kernels.panel) for bias in biases]
        self._struct = GroupStruct(self.in_features, len(weights))
        for member, width in enumerate(self.widths):
            self._struct.module[member].width = width
        self._own: list[WeightsStruct] = []
        self._point()
        self.address = ctypes.addressof(self._struct)
        """Of linear.h's `Group`."""
        self._addresses = (ctypes.c_void_p * MAX_MODULES)()
        self._step = StepContext()
        self._is_head = False
        self.bits = 0
        """The modules' bits in `Segments.touched`."""
        self._input: torch.Tensor | None = None
        self._outputs: list[torch.Tensor | None] = []

    def _point(self) -> None:
        """Tell the operator where the modules' own weights are."""
        self._own = []
        for member, bias in enumerate(self._biases):
            own = self._panels.struct(member)
            own.bias = None if bias is None else bias.data_ptr()
            self._own.append(own)
            self._struct.module[member].weights = own

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The modules' own weights as they are kept."""
        return self._panels.tensors

    def move(self, place: Place) -> None:
        """Have `tensors` lie elsewhere, placed in their order; the modules' own weights must be in use."""
        self._panels.move(place)
        self._point()

    def _pack(self, weights: Sequence[torch.Tensor]) -> Panels:
        if self.quantization == "none":
            return Panels(weights, self._kernels.panel)
        if self.quantization == "int8":
            return Int8Panels(weights, self._kernels.panel)
        return FourBitPanels(weights, self._kernels.panel, self.quantization, double=self._double)

    def attach(self, member: int, slots: LowRankSlots, step: StepContext, is_head: bool) -> None:
        """Add the side paths of a module's adapters from here on; see `AdaptedLinear`."""
        slots.bind(self._struct.module[member])
        self.bits |= 1 << slots.index
        self._step, self._is_head = step, is_head

    def output(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """One module's output [..., rows, out_features] for x [..., rows, in_features]."""
        if x is not self._input or self._outputs[member] is None:
            self._input, self._outputs = x, list(self._run(x))
        out = self._outputs[member]
        assert out is not None
        self._outputs[member] = None
        if not any(output is not None for output in self._outputs):
            self._input = None
        return out

    def _run(self, x: torch.Tensor) -> list[torch.Tensor]:
        if x.dtype is not self.dtype:
            raise TypeError(f"expected rows in {self.dtype}, got {x.dtype}")
        x = x.contiguous()
        shape = x.shape[:-1]
        outs = [torch.empty(*shape, width, dtype=self._out_dtype) for width in self.widths]
        for i, out in enumerate(outs):
            self._addresses[i] = out.data_ptr()
        segments = self._step.head_segments if self._is_head else self._step.segments
        if not segments.touched & self.bits:
            segments = NO_SEGMENTS
        self._kernels.linear(
            DTYPES[self.dtype], DTYPES[self._out_dtype], self.address, x.data_ptr(), shape.numel(),
            self._addresses, segments.table.data_ptr(), len(segments.host), self._step.scratch.data_ptr(),
            segments.max_rank, torch.get_num_threads(),
        )  # fmt: skip
        return outs

    def unpacked(self, member: int) -> torch.Tensor:
        """A copy of one module's weight [out_features, in_features]."""
        return self._panels.unpacked(member)

    def gather(self, at: torch.Tensor) -> torch.Tensor:
        """Copies of some rows [n, in_features] of the weight of a single module that isn't quantized."""
        return self._panels.gather(at)

    def bias(self, member: int) -> torch.Tensor | None:
        """One module's bias, float32 [out_features], or None."""
        bias = self._biases[member]
        return None if bias is None else bias[: self.widths[member]]

    def merged(
        self,
        member: int,
        slots: LowRankSlots,
        slot: int,
        *,
        requantize: bool,
        memory: torch.Tensor | None = None,
    ) -> Generator[None, None, PackedWeights]:
        """One module's own weights with an adapter's folded in; yields where it may be interrupted.

        Args:
            slots: the module's, with the adapter's weights in `slot`.
            requantize: keep them as the module's own are kept, instead of in the group's type.
            memory: uint8 [`panel_bytes`], where they are to lie unless they are requantized.
        """
        assert bytes(self._struct.module[member].weights) == bytes(self._own[member]), "merges don't add up"
        width, panel = self.widths[member], self._kernels.panel
        count = -(-width // panel)
        pair = (2,) if self.dtype == torch.bfloat16 else ()
        inputs = -(-self.in_features // 2) if pair else self.in_features
        shape = (count, inputs, panel, *pair)
        if memory is None:
            weight = torch.empty(shape, dtype=self.dtype)
        else:
            weight = memory.view(self.dtype).view(shape)
        change = slots.dense(slot)
        if change is not None:
            yield from self._fold(member, change, weight)
            bias = self._folded_bias(member, change)
        else:
            at_once = max(torch.get_num_threads(), _SLICE // (self.in_features * panel))
            for first in range(0, count, at_once):
                self._kernels.merge(
                    DTYPES[self.dtype], self.address, member, slot, first, min(first + at_once, count),
                    weight.data_ptr(), torch.get_num_threads(),
                )  # fmt: skip
                yield
            bias = self._biases[member]
            extra = slots.bias(slot)
            if extra is not None:
                bias = extra.clone() if bias is None else bias + extra
        tensors: tuple[torch.Tensor, ...] = (weight,)
        if not requantize or self.quantization == "none":
            struct = WeightsStruct(weight=weight.data_ptr(), storage=STORAGE["none"])
        else:
            rows = unpack(weight, (width, self.in_features))
            yield
            panels = self._pack([rows])
            struct, tensors = panels.struct(0), panels.tensors
        if bias is not None:
            struct.bias = bias.data_ptr()
            if bias is not self._biases[member]:
                tensors += (bias,)
        return PackedWeights(struct, tensors)

    def _fold(self, member: int, change: Dense, weight: torch.Tensor) -> Generator[None, None, None]:
        """Fill the panels of a copy with one module's changed weights, rounded once."""
        panel = self._kernels.panel
        count = len(weight)
        # As many panels as whole spans of rows.
        step = change.span // math.gcd(change.span, panel)
        at_once = max(1, _DENSE_SLICE // (self.in_features * panel * step)) * step
        for first in range(0, count, at_once):
            last = min(first + at_once, count)
            rows = self._panels.rows(member, first, last).float()
            weight[first:last] = pack(change.fold(rows, first * panel).to(self.dtype), panel)
            yield

    def _folded_bias(self, member: int, change: Dense) -> torch.Tensor | None:
        """One module's bias with a change in it, float32 in whole panels; its own if that changes nothing."""
        own = self.bias(member)
        bias = change.fold_bias(own)
        return self._biases[member] if bias is own or bias is None else padded(bias, self._kernels.panel)

    def panel_bytes(self, member: int) -> int:
        """What one module's weights take in panels of the group's type."""
        columns = -(-self.widths[member] // self._kernels.panel) * self._kernels.panel
        pairs = self.dtype == torch.bfloat16
        return columns * (self.in_features + (self.in_features % 2 if pairs else 0)) * self.dtype.itemsize

    def merged_bytes(self, member: int, *, requantize: bool) -> int:
        """What `merged` takes at most."""
        columns = -(-self.widths[member] // self._kernels.panel) * self._kernels.panel
        others = 2 * columns * 4  # a bias, and a scale by column
        if not requantize or self.quantization == "none":
            return self.panel_bytes(member) + others
        if self.quantization == "int8":
            return columns * (self.in_features + 7) // 8 * 8 + others
        return columns * self.in_features * 9 // 16 + others + 64

    def use(self, member: int, weights: PackedWeights | None) -> None:
        """Multiply by these from here on, None being the module's own."""
        self._struct.module[member].weights = self._own[member] if weights is None else weights.struct

    @property
    def nbytes(self) -> int:
        """Bytes of memory that weights and biases take."""
        return self._panels.nbytes + sum(bias.nbytes for bias in self._biases if bias is not None)


class PackedLinear(nn.Module):
    """One module of a group, in the place of the base's own."""

    def __init__(self, group: LinearGroup, member: int) -> None:
        super().__init__()
        self.group = group
        self.member = member
        self.in_features = group.in_features
        self.out_features = group.widths[member]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., rows, in_features] to [..., rows, out_features]."""
        return self.group.output(self.member, x)

    @property
    def weight(self) -> torch.Tensor:
        """A copy of the weight [out_features, in_features], unpacked."""
        return self.group.unpacked(self.member)

    @property
    def bias(self) -> torch.Tensor | None:
        """float32 [out_features], or None."""
        return self.group.bias(self.member)
