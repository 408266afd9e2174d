"""Weights of linear modules in panels of columns, as native/panels*.h read them.

float32 as [panels, in, columns]; bfloat16 and int8 as [panels, in / 2, columns, 2]; 4-bit ones as
[panels, in / 2, columns] of two in a byte. What fills up the last panel and an odd number of inputs is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

Quantization = Literal["none", "int8", "nf4", "fp4"]
BLOCK = 64
"""Inputs that share a scale in 4 bits."""


class Panels:
    """The weights of modules that read the same input, one module's panels after another's.

    Args:
        weights: [out_features, in_features] each, all float32 or all bfloat16; not kept.
        columns: in a panel.
        quantization: "int8" by column; "nf4" or "fp4" by column and BLOCK of inputs, of which there must be
            whole ones.
        double: the scales of 4-bit weights are quantized in turn, as QLoRA does (they are kept in float32).
    """

    weight: torch.Tensor
    """[panels, ...]"""
    scale: torch.Tensor | None = None
    """float32 [panels, columns] of int8 weights, [panels, in / BLOCK, columns] of 4-bit ones, else None."""
    values: torch.Tensor | None = None
    """float32 [16], what 4 bits stand for, else None."""

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        columns: int,
        quantization: Quantization = "none",
        *,
        double: bool = True,
    ) -> None:
        self.dtype = weights[0].dtype
        self._shapes = [weight.shape for weight in weights]
        self._counts = [-(-weight.shape[0] // columns) for weight in weights]
        if quantization == "none":
            self.weight = torch.cat([pack(weight, columns) for weight in weights])
            return
        if quantization == "int8":
            quantized = [quantize_int8(weight) for weight in weights]
            self.weight = torch.cat([_paired(whole, columns) for whole, _ in quantized])
            self.scale = torch.cat([padded(scale, columns).view(-1, columns) for _, scale in quantized])
            return
        parts = []
        for weight in weights:
            codes, scale, self.values = quantize_4bit(weight, quantization, double=double)
            parts.append((_plain(codes, columns), _plain(scale, columns)))
        self.weight = torch.cat([codes[:, ::2] | codes[:, 1::2] << 4 for codes, _ in parts])
        self.scale = torch.cat([scale for _, scale in parts])

    def unpacked(self, member: int) -> torch.Tensor:
        """A copy of one module's weight [out_features, in_features], dequantized."""
        return self.rows(member, 0, self._counts[member]).to(self.dtype)

    def rows(self, member: int, first: int, last: int) -> torch.Tensor:
        """A copy of what panels [first, last) of one module stand for, [rows, in_features]."""
        before = sum(self._counts[:member])
        mine = slice(before + first, before + last)
        outputs, inputs = self._shapes[member]
        panels = self.weight[mine]
        columns = panels.shape[2]
        if self.values is not None:
            assert self.scale is not None
            codes = torch.stack([panels & 15, panels >> 4], 2).flatten(1, 2)
            panels = self.values[codes.long()] * self.scale[mine].repeat_interleave(BLOCK, 1)
        elif self.scale is not None:
            panels = panels * self.scale[mine][:, None, :, None]
        return unpack(panels, (min(outputs, last * columns) - first * columns, inputs))

    def gather(self, at: torch.Tensor) -> torch.Tensor:
        """Copies of some rows [n, in_features] of the only module's weight, which isn't quantized."""
        assert len(self._shapes) == 1
        assert self.scale is None
        columns = self.weight.shape[2]
        picked = self.weight[at // columns, :, at % columns].flatten(1)
        return picked[:, : self._shapes[0][1]]

    def addresses(self, member: int) -> tuple[int, int | None, int | None]:
        """Of one module's weight, scale and values."""
        first = sum(self._counts[:member])
        scale, values = self.scale, self.values
        return (
            self.weight[first:].data_ptr(),
            None if scale is None else scale[first:].data_ptr(),
            None if values is None else values.data_ptr(),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of memory that they take."""
        return sum(t.nbytes for t in (self.weight, self.scale, self.values) if t is not None)


def pack(weight: torch.Tensor, columns: int) -> torch.Tensor:
    """Panels of a weight [out_features, in_features] in float32 or bfloat16."""
    return (_paired if weight.dtype == torch.bfloat16 else _plain)(weight, columns)


def unpack(panels: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """[out_features, in_features] of plain or paired panels."""
    rows = panels.transpose(1, 2).flatten(2).flatten(0, 1)
    return rows[: shape[0], : shape[1]].contiguous()


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row to whole numbers of at most 127 times a scale, as bitsandbytes' `int8_vectorwise_quant`.

    Returns:
        int8 [out_features, in_features] and float32 [out_features].
    """
    weight = weight.float()
    scale = weight.abs().amax(1) / 127
    rounded = (weight / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
    return rounded.to(torch.int8), scale


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


def padded(x: torch.Tensor, columns: int) -> torch.Tensor:
    """[n] with zeros up to whole panels."""
    return nn.functional.pad(x, (0, -len(x) % columns)).contiguous()


def _plain(weight: torch.Tensor, columns: int) -> torch.Tensor:
    """[panels, in, columns]"""
    full = nn.functional.pad(weight, (0, 0, 0, -weight.shape[0] % columns))
    return full.view(-1, columns, full.shape[1]).transpose(1, 2).contiguous()


def _paired(weight: torch.Tensor, columns: int) -> torch.Tensor:
    """[panels, in / 2, columns, 2]"""
    full = nn.functional.pad(weight, (0, weight.shape[1] % 2, 0, -weight.shape[0] % columns)).contiguous()
    # A pair moves as one number of twice the size: copying by pairs would take many times as long.
    pairs = full.view(torch.int32 if weight.dtype == torch.bfloat16 else torch.int16)
    moved = pairs.view(-1, columns, pairs.shape[1]).transpose(1, 2).contiguous()
    return moved[..., None].view(weight.dtype)
