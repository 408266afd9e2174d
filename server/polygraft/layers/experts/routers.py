"""Modules of a base that choose experts, with adapters' low-rank weights on theirs.

What a router does with its weight is its own code's, so the rows of an adapter go through that code with the
adapter in the weight: a matrix of experts times hidden_size, made anew in each step.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import LowRank
from polygraft.layers.segments import stretches
from polygraft.layers.step import StepContext

_WEIGHT = "weight"


class AdaptedRouter(nn.Module):
    """A router with the weights of the step's adapters.

    Args:
        base_layer: untouched; maps rows of hidden_size to one tensor or several of as many rows.
        index: its bit in `Segments.touched`.
    """

    def __init__(self, base_layer: nn.Module, index: int, step: StepContext) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.index = index
        self._step = step
        self._own: dict[int, LowRank] = {}

    def install(self, slot: int, primitive: LowRank) -> None:
        """Put an adapter's weights into a slot."""
        device = getattr(self.base_layer, _WEIGHT).device
        a, b = primitive.a.to(device, copy=True), primitive.b.to(device, copy=True)
        self._own[slot] = replace(primitive, a=a, b=b)

    def remove(self, slot: int) -> None:
        """Empty a slot; no step that uses it may be running."""
        self._own.pop(slot, None)

    def holds(self, slot: int) -> bool:
        """Whether an adapter has weights here."""
        return slot in self._own

    def folded(self, stack: Mapping[int, float]) -> torch.Tensor:
        """The router's weight with those of adapters in it, rounded once.

        Args:
            stack: factors by slot.
        """
        weight: torch.Tensor = getattr(self.base_layer, _WEIGHT).detach()
        merged = weight.float()
        for slot, factor in stack.items():
            merged = merged + factor * self._own[slot].product
        return merged.to(weight.dtype)

    def forward(self, x: torch.Tensor) -> Any:
        """As the router's."""
        out = self.base_layer(x)
        segments = self._step.segments
        if not segments.touched >> self.index & 1:
            return out
        parts = out if isinstance(out, tuple) else (out,)
        x = x.reshape(-1, x.shape[-1])
        for first, last, stack in stretches(segments.host, self._own):
            weight = self.folded({segment.slot: segment.weight for segment in stack})
            rows = torch.func.functional_call(self.base_layer, {_WEIGHT: weight}, (x[first:last],))
            for part, own in zip(parts, rows if isinstance(rows, tuple) else (rows,), strict=True):
                part[first:last] = own
        return out

    def __getattr__(self, name: str) -> Any:
        """The base layer's own attributes, for model code that reads its weight and the like."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


class RouterMergeSite:
    """A router's weight, to be exchanged for a copy: a `MergeSite`."""

    def __init__(self, router: AdaptedRouter) -> None:
        self._router = router
        own = getattr(router.base_layer, _WEIGHT)
        assert isinstance(own, nn.Parameter)
        self._own = own

    def merge(
        self, slot: int, *, requantize: bool, memory: torch.Tensor | None = None
    ) -> Generator[None, None, nn.Parameter]:
        """See `MergeSite`."""
        yield
        return nn.Parameter(self._router.folded({slot: 1.0}), requires_grad=False)

    def memory_bytes(self, *, requantize: bool) -> int:
        """See `MergeSite`."""
        return 0

    def merged_bytes(self, *, requantize: bool) -> int:
        """See `MergeSite`."""
        return self._own.nbytes

    def use(self, part: nn.Parameter | None) -> None:
        """See `MergeSite`."""
        setattr(self._router.base_layer, _WEIGHT, self._own if part is None else part)

    def part_bytes(self, part: nn.Parameter) -> int:
        """See `MergeSite`."""
        return part.nbytes


class Routers:
    """All of one base, in the places of its modules.

    Args:
        first_bit: of the modules' in `Segments.touched`.
    """

    def __init__(self, model: nn.Module, names: Mapping[str, Any], step: StepContext, first_bit: int) -> None:
        self._routers: dict[str, AdaptedRouter] = {}
        for bit, name in enumerate(names, first_bit):
            self._routers[name] = AdaptedRouter(model.get_submodule(name), bit, step)
            model.set_submodule(name, self._routers[name])
        self._merge_sites = {name: RouterMergeSite(router) for name, router in self._routers.items()}

    def install(self, slot: int, modules: Mapping[str, ModuleChange]) -> int:
        """Take an adapter's changes of routers in, and return the routers' bits."""
        touched = 0
        for name, router in self._routers.items():
            change = modules.get(name)
            if change is not None and change.low_rank is not None:
                router.install(slot, change.low_rank)
                touched |= 1 << router.index
        return touched

    def remove(self, slot: int) -> None:
        """Let an adapter go; no step that uses it may be running."""
        for router in self._routers.values():
            router.remove(slot)

    def merge_sites(self, slot: int) -> list[RouterMergeSite]:
        """Where an adapter's weights can be folded into the base's."""
        return [self._merge_sites[name] for name, router in self._routers.items() if router.holds(slot)]
