"""int8 weights of linear modules in panels, as native/panels_int8.h reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from polygraft.layers.linear.memory import Place
from polygraft.layers.linear.panels import Panels, padded
from polygraft.layers.native.structures import WeightsStruct

_INPUTS = 8  # rows_int8.h's kInt8Inputs
_MIDDLE = 128


class Int8Panels(Panels):
    """Panels [panels, inputs / 4, columns, 4] of unsigned bytes around 128, with a scale by column."""

    storage = "int8"

    def _fill(self, weights: Sequence[torch.Tensor]) -> None:
        quantized = [quantize_int8(weight) for weight in weights]
        self.weight = torch.cat([_by_fours(whole, self.columns) for whole, _ in quantized])
        self.scale = torch.cat([padded(scale, self.columns).view(-1, self.columns) for _, scale in quantized])

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that is kept."""
        return self.weight, self.scale

    def move(self, place: Place) -> None:
        """Have `tensors` lie elsewhere, placed in their order."""
        super().move(place)
        self.scale = place(self.scale)

    def _dequantized(self, member: int, first: int, last: int) -> torch.Tensor:
        panels = super()._dequantized(member, first, last).transpose(2, 3).flatten(1, 2)
        before = self._before(member)
        return (panels.float() - _MIDDLE) * self.scale[before + first : before + last, None]

    def struct(self, member: int) -> WeightsStruct:
        """One module's weights as the operators find them, without a bias; valid as long as the panels."""
        struct = super().struct(member)
        struct.scale = self._address(self.scale, member)
        return struct


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row to whole numbers of at most 127 times a scale, as bitsandbytes' `int8_vectorwise_quant`.

    Returns:
        int8 [out_features, in_features] and float32 [out_features].
    """
    weight = weight.float()
    scale = weight.abs().amax(1) / 127
    rounded = (weight / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
    return rounded.to(torch.int8), scale


def _by_fours(whole: torch.Tensor, columns: int) -> torch.Tensor:
    """uint8 [panels, inputs / 4, columns, 4]"""
    around = (whole.to(torch.int16) + _MIDDLE).to(torch.uint8)
    fill = (0, -whole.shape[1] % _INPUTS, 0, -whole.shape[0] % columns)
    full = nn.functional.pad(around, fill, value=_MIDDLE).contiguous()
    # Four move as one number: copying them one by one would take many times as long.
    fours = full.view(torch.int32)
    moved = fours.view(-1, columns, fours.shape[1]).transpose(1, 2).contiguous()
    return moved[..., None].view(torch.uint8)
