"""Merged copies of experts' weights: one parameter of a module with an adapter's low-rank weights in it."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import nn

from polygraft.layers.experts.low_rank import ExpertSlots

_SLICE = 2**18
"""Weights that are merged at a stretch: about a millisecond's work."""


class ExpertsMergeSite:
    """One parameter that can be exchanged for a copy: a `MergeSite`.

    Args:
        module: what holds the parameter, as `base/inspect/experts.py` finds it.
        slots: the parameter's.
        numbers: by slot of the bank, the adapter's in `slots`.
    """

    def __init__(
        self, module: nn.Module, name: str, slots: ExpertSlots, numbers: dict[int, int], *, transposed: bool
    ) -> None:
        self._module = module
        self._name = name
        self._slots = slots
        self._numbers = numbers
        self._transposed = transposed
        own = getattr(module, name)
        assert isinstance(own, nn.Parameter)
        self._own = own

    def merge(
        self, slot: int, *, requantize: bool, memory: torch.Tensor | None = None
    ) -> Generator[None, None, nn.Parameter]:
        """See `MergeSite`. Experts' weights are never quantized, so neither are copies."""
        own = self._own.detach()
        merged = torch.empty_like(own) if memory is None else memory.view(own.dtype).view(own.shape)
        for expert in range(len(own)):
            # [out_features, in_features] whatever way they lie.
            weight, copy = (w[expert].t() if self._transposed else w[expert] for w in (own, merged))
            rows = max(1, _SLICE // weight.shape[1])
            for first in range(0, len(weight), rows):
                last = min(first + rows, len(weight))
                delta = self._slots.delta(self._numbers[slot], expert, first, last)
                copy[first:last] = weight[first:last].float() + delta
                yield
        return nn.Parameter(merged, requires_grad=False)

    def memory_bytes(self, *, requantize: bool) -> int:
        """See `MergeSite`."""
        return self._own.nbytes if self._own.device.type == "cpu" else 0

    def merged_bytes(self, *, requantize: bool) -> int:
        """See `MergeSite`."""
        return self._own.nbytes

    def use(self, part: nn.Parameter | None) -> None:
        """See `MergeSite`."""
        setattr(self._module, self._name, self._own if part is None else part)

    def part_bytes(self, part: nn.Parameter) -> int:
        """See `MergeSite`."""
        return part.nbytes
