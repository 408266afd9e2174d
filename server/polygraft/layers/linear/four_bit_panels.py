"""4-bit weights of linear modules in panels, as native/panels_4bit.h reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polygraft.layers.linear.memory import Place
from polygraft.layers.linear.panels import Panels, plain
from polygraft.layers.native.structures import WeightsStruct

BLOCK = 64
"""Inputs that share a scale."""


class FourBitPanels(Panels):
    """Panels [panels, in / 2, columns] of two codes in a byte, with a scale by column and BLOCK of inputs.

    Args:
        weights: of whole blocks of inputs.
        kind: "nf4" or "fp4".
        double: the scales are quantized in turn, as QLoRA does (they are kept in float32).
    """

    def __init__(
        self, weights: Sequence[torch.Tensor], columns: int, kind: str, *, double: bool = True
    ) -> None:
        self.storage = kind
        self._double = double
        super().__init__(weights, columns)

    def _fill(self, weights: Sequence[torch.Tensor]) -> None:
        parts = []
        for weight in weights:
            codes, scale, self.values = quantize_4bit(weight, self.storage, double=self._double)
            parts.append((plain(codes, self.columns), plain(scale, self.columns)))
        self.weight = torch.cat([codes[:, ::2] | codes[:, 1::2] << 4 for codes, _ in parts])
        self.scale = torch.cat([scale for _, scale in parts])

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that is kept."""
        return self.weight, self.scale, self.values

    def move(self, place: Place) -> None:
        """Have `tensors` lie elsewhere, placed in their order."""
        super().move(place)
        self.scale, self.values = place(self.scale), place(self.values)

    def _dequantized(self, member: int, first: int, last: int) -> torch.Tensor:
        panels = super()._dequantized(member, first, last)
        codes = torch.stack([panels & 15, panels >> 4], 2).flatten(1, 2)
        before = self._before(member)
        return self.values[codes.long()] * self.scale[before + first : before + last].repeat_interleave(
            BLOCK, 1
        )

    def struct(self, member: int) -> WeightsStruct:
        """One module's weights as the operators find them, without a bias; valid as long as the panels."""
        struct = super().struct(member)
        struct.scale, struct.values = self._address(self.scale, member), self.values.data_ptr()
        return struct


def quantize_4bit(
    weight: torch.Tensor, kind: str, *, double: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bitsandbytes' own 4-bit quantization.

    Args:
        kind: "nf4" or "fp4".
        double: round the scales to 8 bits, as it does with `compress_statistics`.

    Returns:
        uint8 [out_features, in_features] below 16; float32 [out_features, in_features / BLOCK]; and
        float32 [16], what the codes stand for.
    """
    # Imported here: it costs seconds, and other bases don't need it.
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, quant_type=kind, compress_statistics=double
    )
    scale = state.absmax
    if state.nested:
        scale = functional.dequantize_blockwise(scale, state.state2) + state.offset
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], -1).view(weight.shape)
    return codes, scale.float().view(len(weight), -1), state.code.float()
