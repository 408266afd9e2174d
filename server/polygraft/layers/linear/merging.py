"""Merged weights: copies of the base's with one adapter folded in, and the switch between them.

Nothing is ever subtracted: the base's own weights stay where they are, and a copy is used in their place for
the steps that want it (as in dLoRA, OSDI 2024). Only the modules that an adapter touches are copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from polygraft.layers.linear.int8_linear import Int8Linear
from polygraft.layers.linear.onednn_linear import OneDnnLinear
from polygraft.layers.linear.wide_head import WideLinear, wide_product

if TYPE_CHECKING:
    from polygraft.layers.linear.linear import LinearGroup, PackedWeights
    from polygraft.layers.linear.low_rank import AdaptedLinear, LowRankSlots

Part = TypeVar("Part")
_LINE = 64  # bytes of a cache line


class MergeSite(Protocol[Part]):
    """A part of the base that can multiply by other weights than its own."""

    def merge(
        self, slot: int, *, requantize: bool, memory: torch.Tensor | None = None
    ) -> Generator[None, None, Part]:
        """Fold the adapter in `slot` into a copy; yields where it may be interrupted.

        The module must be using its own weights whenever it goes on.

        Args:
            memory: uint8 [`memory_bytes`] on the CPU for the copy's weights, or None if that is 0.
        """

    def memory_bytes(self, *, requantize: bool) -> int:
        """Bytes of memory that `merge` wants to be given; 0 if it takes its own."""

    def merged_bytes(self, *, requantize: bool) -> int:
        """What a copy takes at most."""

    def use(self, part: Part | None) -> None:
        """Use a copy from here on, None being the module's own weights."""

    def part_bytes(self, part: Part) -> int:
        """What a copy takes."""


class LinearSite(MergeSite[Part], Protocol[Part]):
    """A linear module. `slots` are its adapters'."""

    slots: LowRankSlots

    def weight(self) -> torch.Tensor:
        """The module's own weight [out_features, in_features], not to be written to."""


AnySite = MergeSite[Any]
AnyLinearSite = LinearSite[Any]


class PackedSite:
    """A module whose product is our own operator."""

    def __init__(self, group: LinearGroup, member: int, slots: LowRankSlots) -> None:
        self.slots = slots
        self._group = group
        self._member = member

    def weight(self) -> torch.Tensor:
        """See `MergeSite`."""
        return self._group.unpacked(self._member)

    def merge(
        self, slot: int, *, requantize: bool, memory: torch.Tensor | None = None
    ) -> Generator[None, None, PackedWeights]:
        """See `MergeSite`."""
        return (
            yield from self._group.merged(
                self._member, self.slots, slot, requantize=requantize, memory=memory
            )
        )

    def memory_bytes(self, *, requantize: bool) -> int:
        """See `MergeSite`."""
        again = requantize and self._group.quantization != "none"
        return 0 if again else self._group.panel_bytes(self._member)

    def merged_bytes(self, *, requantize: bool) -> int:
        """See `MergeSite`."""
        return self._group.merged_bytes(self._member, requantize=requantize)

    def use(self, part: PackedWeights | None) -> None:
        """See `MergeSite`."""
        self._group.use(self._member, part)

    def part_bytes(self, part: PackedWeights) -> int:
        """See `MergeSite`."""
        return part.nbytes


class PlainSite:
    """A module of any other make."""

    def __init__(self, adapted: AdaptedLinear) -> None:
        self.slots = adapted.slots
        self._adapted = adapted

    def weight(self) -> torch.Tensor:
        """See `MergeSite`."""
        return dense_weight(self._adapted.base_layer)

    def memory_bytes(self, *, requantize: bool) -> int:
        """See `MergeSite`."""
        return 0

    def merge(
        self, slot: int, *, requantize: bool, memory: torch.Tensor | None = None
    ) -> Generator[None, None, nn.Module]:
        """See `MergeSite`."""
        layer = self._adapted.base_layer
        weight = dense_weight(layer)
        dtype = weight.dtype
        yield
        merged = self.slots.fold(slot, weight).to(dtype)
        yield
        bias = self.slots.fold_bias(slot, getattr(layer, "bias", None))
        bias = None if bias is None else bias[: len(weight)].to(dtype)
        if isinstance(layer, OneDnnLinear):
            return OneDnnLinear(merged, bias)
        wide = isinstance(layer, WideLinear) or (isinstance(layer, Int8Linear) and layer.wide)
        if isinstance(layer, Int8Linear) and requantize:
            return Int8Linear(merged, bias, wide=wide)
        return _PlainLinear(merged, bias, wide=wide)

    def merged_bytes(self, *, requantize: bool) -> int:
        """See `MergeSite`."""
        layer = cast("Any", self._adapted.base_layer)
        weights, outputs = (
            (layer.nx * layer.nf, layer.nf)
            if isinstance(layer, Conv1D)
            else (layer.in_features * layer.out_features, layer.out_features)
        )
        own = layer.weight if isinstance(layer, nn.Linear | Conv1D) else None
        itemsize = own.dtype.itemsize if own is not None and own.is_floating_point() else 4
        return int(weights * itemsize + 2 * outputs * 4)

    def use(self, part: nn.Module | None) -> None:
        """See `MergeSite`."""
        self._adapted.use(part)

    def part_bytes(self, part: nn.Module) -> int:
        """See `MergeSite`."""
        assert isinstance(part, OneDnnLinear | Int8Linear | _PlainLinear)
        return part.nbytes


class _PlainLinear(nn.Module):
    """torch's own product with weights that are no parameters.

    Args:
        wide: outputs are in float32.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, wide: bool) -> None:
        super().__init__()
        self._weight = weight
        self._bias = bias
        self._product = wide_product if wide else nn.functional.linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        return self._product(x, self._weight, self._bias)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the weight takes."""
        return self._weight.nbytes


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """A linear module's weight [out_features, in_features] as its product uses it, of whatever make it is."""
    if isinstance(layer, OneDnnLinear):
        return layer.unpacked()
    weight: torch.Tensor = cast("Any", layer).weight
    if isinstance(layer, Conv1D):
        return weight.detach().t()
    if weight.is_floating_point():
        return weight.detach()
    # bitsandbytes' packed weights: once its CPU kernel has repacked them, its own dequantize gives garbage
    # without a word. The unit vectors' products are the weight's columns whatever lies in memory.
    quantized = cast("Any", layer)
    bias, quantized.bias = quantized.bias, None
    try:
        compute = getattr(quantized, "compute_dtype", None) or torch.float32
        unit = torch.eye(quantized.in_features, dtype=compute)
        columns: torch.Tensor = layer(unit.to(weight.device))
    finally:
        quantized.bias = bias
    return columns.t().contiguous()


@dataclass(frozen=True, slots=True)
class MergedWeights:
    """A copy: the modules that one adapter touches, each with its weights folded in."""

    parts: tuple[tuple[AnySite, Any], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        return sum(site.part_bytes(part) for site, part in self.parts)


def merge(sites: Sequence[AnySite], slot: int, *, requantize: bool) -> Generator[None, None, MergedWeights]:
    """Fold the adapter in `slot` into copies of these modules' weights; yields where it may be interrupted.

    The base's own weights must be in use whenever it goes on.
    """
    parts = []
    sizes = [site.memory_bytes(requantize=requantize) for site in sites]
    starts = list(itertools.accumulate((-(-size // _LINE) * _LINE for size in sizes), initial=0))
    # In one piece, which the system gets back when the copy goes: hundreds of smaller ones, made and given
    # up again and again, would leave holes in the heap. Not in large pages: the kernel may have to make room
    # for them first, and a copy of the default model took 0.4 s instead of 0.1.
    memory = torch.empty(starts[-1], dtype=torch.uint8)
    for site, size, start in zip(sites, sizes, starts, strict=False):
        own = memory[start : start + size] if size else None
        parts.append((site, (yield from site.merge(slot, requantize=requantize, memory=own))))
    return MergedWeights(tuple(parts))


class WeightSwitch:
    """Which weights the base multiplies by: its own, or one merged copy's."""

    def __init__(self) -> None:
        self._active: MergedWeights | None = None

    def use(self, copy: MergedWeights | None) -> bool:
        """Use a copy from here on, None being the base's own weights; returns whether anything changed."""
        if copy is self._active:
            return False
        if self._active is not None:
            for site, _ in self._active.parts:
                site.use(None)
        if copy is not None:
            for site, part in copy.parts:
                site.use(part)
        self._active = copy
        return True
