"""Linear modules of the base whose products and side paths are one C++ operator.

Modules that read the same input, such as q, k and v, form a group: the first of them that is called computes
all, the others hand out what is there. `panels.py` says how their weights lie. The sums are in float32 (of
int8 weights, in whole numbers), and a row's result doesn't depend on the number of rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import nn

from polygraft.layers.low_rank import LowRankSlots
from polygraft.layers.native.kernels import DTYPES, Kernels
from polygraft.layers.native.structures import MAX_MODULES, STORAGE, GroupStruct
from polygraft.layers.panels import Panels, Quantization, padded
from polygraft.layers.step import NO_SEGMENTS, StepContext


class LinearGroup:
    """Linear modules that read the same input.

    Args:
        weights: of 1 to MAX_MODULES modules [out_features, in_features], on the CPU, in one of float32 and
            bfloat16; not kept.
        biases: [out_features] each, or None.
        quantization, double: how the weights are kept, as `Panels` says.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        kernels: Kernels,
        quantization: Quantization = "none",
        *,
        double: bool = True,
    ) -> None:
        self.dtype = weights[0].dtype
        self.quantization = quantization
        self.in_features = weights[0].shape[1]
        self.widths = [weight.shape[0] for weight in weights]
        self._kernels = kernels
        self._panels = Panels(weights, kernels.panel, quantization, double=double)
        self._biases = [None if bias is None else padded(bias.float(), kernels.panel) for bias in biases]
        self._struct = GroupStruct(
            self._panels.weight.data_ptr(),
            None if self._panels.scale is None else self._panels.scale.data_ptr(),
            None if self._panels.values is None else self._panels.values.data_ptr(),
            STORAGE[quantization],
            self.in_features,
            len(weights),
        )
        for module, width, bias in zip(self._struct.module, self.widths, self._biases, strict=False):
            module.width = width
            module.bias = None if bias is None else bias.data_ptr()
        self.address = ctypes.addressof(self._struct)
        """Of linear.h's `Group`."""
        self._addresses = (ctypes.c_void_p * MAX_MODULES)()
        self._step = StepContext()
        self._is_head = False
        self.bits = 0
        """The modules' bits in `Segments.touched`."""
        self._input: torch.Tensor | None = None
        self._outputs: list[torch.Tensor | None] = []

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
        outs = [torch.empty(*shape, width, dtype=self.dtype) for width in self.widths]
        for i, out in enumerate(outs):
            self._addresses[i] = out.data_ptr()
        segments = self._step.head_segments if self._is_head else self._step.segments
        if not segments.touched & self.bits:
            segments = NO_SEGMENTS
        self._kernels.linear(
            DTYPES[self.dtype], self.address, x.data_ptr(), shape.numel(), self._addresses,
            segments.table.data_ptr(), len(segments.host), self._step.scratch.data_ptr(), segments.max_rank,
            torch.get_num_threads(),
        )  # fmt: skip
        return outs

    def unpacked(self, member: int) -> torch.Tensor:
        """A copy of one module's weight [out_features, in_features]."""
        return self._panels.unpacked(member)

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
