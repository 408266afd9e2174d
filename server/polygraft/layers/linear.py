"""Linear modules of the base whose products and side paths are one C++ operator.

Modules that read the same input, such as q, k and v, form a group: the first of them that is called computes
all, the others hand out what is there. Their weights lie in panels of columns, as native/linear.h reads them:
float32 as [panels, in, columns]; bfloat16 as [panels, in / 2, columns, 2]. The sums are in float32, and a
row's result doesn't depend on the number of rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import nn

from polygraft.layers.low_rank import LowRankSlots
from polygraft.layers.native.kernels import DTYPES, MAX_MODULES, GroupStruct, Kernels
from polygraft.layers.step import NO_SEGMENTS, StepContext


class LinearGroup:
    """Linear modules that read the same input.

    Args:
        weights: of 1 to MAX_MODULES modules [out_features, in_features], on the CPU, in one of float32 and
            bfloat16; not kept.
        biases: [out_features] each, or None.
    """

    def __init__(
        self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], kernels: Kernels
    ) -> None:
        self.dtype = weights[0].dtype
        self.in_features = weights[0].shape[1]
        self.widths = [weight.shape[0] for weight in weights]
        self._kernels = kernels
        self._panels = [-(-width // kernels.panel) for width in self.widths]
        self._weight = torch.cat([_pack(weight, kernels.panel) for weight in weights])
        self._biases = [
            None if bias is None else _padded(bias.float(), panels * kernels.panel)
            for bias, panels in zip(biases, self._panels, strict=True)
        ]
        self._struct = GroupStruct(self._weight.data_ptr(), self.in_features, len(weights))
        for module, width, bias in zip(self._struct.module, self.widths, self._biases, strict=False):
            module.width = width
            module.bias = None if bias is None else bias.data_ptr()
        self._address = ctypes.addressof(self._struct)
        self._addresses = (ctypes.c_void_p * MAX_MODULES)()
        self._step = StepContext()
        self._is_head = False
        self._bits = 0
        self._input: torch.Tensor | None = None
        self._outputs: list[torch.Tensor | None] = []

    def attach(self, member: int, slots: LowRankSlots, step: StepContext, is_head: bool) -> None:
        """Add the side paths of a module's adapters from here on; see `AdaptedLinear`."""
        slots.bind(self._struct.module[member])
        self._bits |= 1 << slots.index
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
        if not segments.touched & self._bits:
            segments = NO_SEGMENTS
        self._kernels.linear(
            DTYPES[self.dtype], self._address, x.data_ptr(), shape.numel(), self._addresses,
            segments.table.data_ptr(), len(segments.host), self._step.scratch.data_ptr(), segments.max_rank,
            torch.get_num_threads(),
        )  # fmt: skip
        return outs

    def unpacked(self, member: int) -> torch.Tensor:
        """A copy of one module's weight [out_features, in_features]."""
        first = sum(self._panels[:member])
        panels = self._weight[first : first + self._panels[member]]
        if self.dtype == torch.bfloat16:
            pairs = panels.view(torch.bfloat16).view(*panels.shape, 2)
            panels = pairs.transpose(2, 3).flatten(1, 2)
        return panels.transpose(1, 2).flatten(0, 1)[: self.widths[member], : self.in_features].contiguous()


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


def _padded(x: torch.Tensor, length: int) -> torch.Tensor:
    return nn.functional.pad(x, (0, length - x.shape[0])).contiguous()


def _pack(weight: torch.Tensor, panel: int) -> torch.Tensor:
    """[panels, in, columns] in float32, or [panels, in / 2, columns] of int32, each two bfloat16."""
    out_features, in_features = weight.shape
    odd = in_features % 2 if weight.dtype == torch.bfloat16 else 0
    padded = nn.functional.pad(weight, (0, odd, 0, -out_features % panel)).contiguous()
    if weight.dtype == torch.bfloat16:
        padded = padded.view(torch.int32)
    return padded.view(-1, panel, padded.shape[1]).transpose(1, 2).contiguous()
