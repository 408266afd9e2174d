"""Rotary positions, computed once and then looked up."""

from __future__ import annotations

import torch
from torch import nn

_MOST_POSITIONS = 2**16
"""How many positions are kept: 32 MB for a head dimension of 128 in bfloat16."""


class PositionTable:
    """A rotary module's outputs by position.

    Looking a step's positions up is one small operation, where the module takes several.

    Args:
        rotary: returns (cos, sin), each [1, rows, head_dim], for x of any type and int64 positions [1, rows].
        context_length: below it, a row's cos and sin depend on its position alone. Beyond it they may depend
            on the longest position in the call.
    """

    def __init__(self, rotary: nn.Module, context_length: int) -> None:
        self._rotary = rotary
        self._most = min(context_length, _MOST_POSITIONS)
        self._cos = self._sin = torch.empty(0)

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the module would."""
        last = int(position_ids.max())
        if last >= self._most or self._rotary._forward_hooks or self._rotary._forward_pre_hooks:
            found: tuple[torch.Tensor, torch.Tensor] = self._rotary(x, position_ids)
            return found
        if last >= len(self._cos) or self._cos.dtype is not x.dtype:
            self._fill(x, last)
        at = position_ids[0]
        return self._cos.index_select(0, at)[None], self._sin.index_select(0, at)[None]

    def _fill(self, x: torch.Tensor, last: int) -> None:
        every = torch.arange(min(self._most, 1 << max(10, last.bit_length())), device=x.device)
        cos, sin = self._rotary(x, every[None])
        self._cos, self._sin = cos[0], sin[0]
