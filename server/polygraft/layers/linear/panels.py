"""Weights of linear modules in panels of columns, as native/panels.h reads them.

float32 as [panels, in, columns]; bfloat16 as [panels, in / 2, columns, 2]. What fills up the last panel and
an odd number of inputs is zero. `int8_panels.py` and `four_bit_panels.py` hold quantized ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from polygraft.layers.linear.memory import Place
from polygraft.layers.native.structures import STORAGE, WeightsStruct


class Panels:
    """The weights of modules that read the same input, one module's panels after another's.

    Args:
        weights: [out_features, in_features] each, all float32 or all bfloat16; not kept.
        columns: in a panel.
    """

    storage = "none"
    """As native/structures.py's `STORAGE` names it."""
    weight: torch.Tensor
    """[panels, ...]"""

    def __init__(self, weights: Sequence[torch.Tensor], columns: int) -> None:
        self.dtype = weights[0].dtype
        self.columns = columns
        self._shapes = [weight.shape for weight in weights]
        self._counts = [-(-weight.shape[0] // columns) for weight in weights]
        self._fill(weights)

    def _fill(self, weights: Sequence[torch.Tensor]) -> None:
        self.weight = torch.cat([pack(weight, self.columns) for weight in weights])

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that is kept."""
        return (self.weight,)

    def move(self, place: Place) -> None:
        """Have `tensors` lie elsewhere, placed in their order."""
        self.weight = place(self.weight)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that they take."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def unpacked(self, member: int) -> torch.Tensor:
        """A copy of one module's weight [out_features, in_features], dequantized."""
        return self.rows(member, 0, self._counts[member]).to(self.dtype)

    def rows(self, member: int, first: int, last: int) -> torch.Tensor:
        """A copy of what panels [first, last) of one module stand for, [rows, in_features]."""
        outputs, inputs = self._shapes[member]
        rows = min(outputs, last * self.columns) - first * self.columns
        return unpack(self._dequantized(member, first, last), (rows, inputs))

    def _dequantized(self, member: int, first: int, last: int) -> torch.Tensor:
        """Panels [first, last) of one module, plain or paired."""
        before = self._before(member)
        return self.weight[before + first : before + last]

    def _before(self, member: int) -> int:
        """Panels of the modules before one."""
        return sum(self._counts[:member])

    def gather(self, at: torch.Tensor) -> torch.Tensor:
        """Copies of some rows [n, in_features] of the only module's weight, which isn't quantized."""
        assert len(self._shapes) == 1
        assert self.storage == "none"
        picked = self.weight[at // self.columns, :, at % self.columns].flatten(1)
        return picked[:, : self._shapes[0][1]]

    def struct(self, member: int) -> WeightsStruct:
        """One module's weights as the operators find them, without a bias; valid as long as the panels."""
        return WeightsStruct(weight=self._address(self.weight, member), storage=STORAGE[self.storage])

    def _address(self, by_panel: torch.Tensor, member: int) -> int:
        """Of what one module has in a tensor [panels, ...]."""
        return by_panel[self._before(member) :].data_ptr()


def pack(weight: torch.Tensor, columns: int) -> torch.Tensor:
    """Panels of a weight [out_features, in_features] in float32 or bfloat16."""
    return (paired if weight.dtype == torch.bfloat16 else plain)(weight, columns)


def unpack(panels: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """[out_features, in_features] of plain or paired panels."""
    rows = panels.transpose(1, 2).flatten(2).flatten(0, 1)
    return rows[: shape[0], : shape[1]].contiguous()


def padded(x: torch.Tensor, columns: int) -> torch.Tensor:
    """[n] with zeros up to whole panels."""
    return nn.functional.pad(x, (0, -len(x) % columns)).contiguous()


def plain(weight: torch.Tensor, columns: int) -> torch.Tensor:
    """[panels, in, columns]"""
    full = nn.functional.pad(weight, (0, 0, 0, -weight.shape[0] % columns))
    return full.view(-1, columns, full.shape[1]).transpose(1, 2).contiguous()


def paired(weight: torch.Tensor, columns: int) -> torch.Tensor:
    """[panels, in / 2, columns, 2]"""
    full = nn.functional.pad(weight, (0, weight.shape[1] % 2, 0, -weight.shape[0] % columns)).contiguous()
    # A pair moves as one number of twice the size: copying by pairs would take many times as long.
    pairs = full.view(torch.int32 if weight.dtype == torch.bfloat16 else torch.int16)
    moved = pairs.view(-1, columns, pairs.shape[1]).transpose(1, 2).contiguous()
    return moved[..., None].view(weight.dtype)
