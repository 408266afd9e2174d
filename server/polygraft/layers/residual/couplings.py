"""Invertible adapters of a step's rows: a coupling behind the embeddings, its inverse before the head.

`primitives.Coupling` says what is computed. Only rows of adapters that have one are touched. It runs in
torch: two small functions for each adapter, in two places of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from polygraft.core.residual_primitives import Coupling, CouplingLayers
from polygraft.layers.residual.activations import ACTIVATIONS
from polygraft.layers.step import Segments, StepContext


class Couplings:
    """All adapters' couplings by slot, before two of the base's modules.

    Args:
        first_layer: the module that reads what comes from the embeddings.
        head: the module that computes logits.
        bit: of couplings in `Segments.touched`.
    """

    def __init__(self, first_layer: nn.Module, head: nn.Module, step: StepContext, bit: int) -> None:
        self._bits = 1 << bit
        self._step = step
        self._couplings: dict[int, Coupling] = {}
        first_layer.register_forward_pre_hook(self._hook(inverse=False))
        head.register_forward_pre_hook(self._hook(inverse=True))

    def _hook(self, *, inverse: bool) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
        def change(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            segments = self._step.head_segments if inverse else self._step.segments
            if not segments.touched & self._bits:
                return None
            return (self.run(args[0], segments, inverse=inverse), *args[1:])

        return change

    def install(self, slot: int, coupling: Coupling) -> int:
        """Take an adapter's in; returns the bits that steps with it touch."""
        self._couplings[slot] = coupling
        return self._bits

    def remove(self, slot: int) -> None:
        """Let an adapter's go; no step that uses it may be running."""
        self._couplings.pop(slot, None)

    def run(self, x: torch.Tensor, segments: Segments, *, inverse: bool) -> torch.Tensor:
        """x [..., rows, hidden], changed in the rows of adapters that have a coupling."""
        x = x.clone()
        for first, last, slot, _, _ in segments.host:
            coupling = self._couplings.get(slot)
            if coupling is not None and (coupling.inverted or not inverse):
                x[..., first:last, :] = couple(coupling, x[..., first:last, :].float(), inverse=inverse).to(x)
        return x


def couple(coupling: Coupling, x: torch.Tensor, *, inverse: bool) -> torch.Tensor:
    """x [..., hidden] through the coupling or back."""
    half = coupling.f.up.shape[0]
    a, b = x[..., :half], x[..., half:]
    if inverse:
        b = b - _function(coupling.g, coupling.activation, a)
        a = a - _function(coupling.f, coupling.activation, b)
    else:
        a = a + _function(coupling.f, coupling.activation, b)
        b = b + _function(coupling.g, coupling.activation, a)
    return torch.cat((a, b), dim=-1)


def _function(layers: CouplingLayers, activation: str, x: torch.Tensor) -> torch.Tensor:
    inner = ACTIVATIONS[activation](nn.functional.linear(x, layers.down.to(x), layers.down_bias.to(x)))
    return nn.functional.linear(inner, layers.up.to(x), layers.up_bias.to(x))
