"""The base's layers as AdapterHub's library sees them: by index, with the names that its tensors have."""

from __future__ import annotations

import re
from dataclasses import dataclass

from polygraft.base.inspect.residual_sites import site_name
from polygraft.core.spec import BaseSpec

_LAYER = re.compile(r"((?:(.+)\.)?[^.\d][^.]*)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the base.

    Args:
        name: such as "model.layers.0".
        attention: name of its attention module.
        places: which of its parts' outputs are the residual sites that the library's bottlenecks work at.
    """

    index: int
    name: str
    attention: str
    places: frozenset[str]

    def site(self, place: str) -> str:
        """Name of its residual site."""
        return site_name(self.name, place)


@dataclass(frozen=True, slots=True)
class BaseLayers:
    """All layers, and the module that holds what they share, such as "model" ("" for none)."""

    body: str
    layers: tuple[Layer, ...]

    def shared(self, name: str) -> str:
        """Name of a module beside the list of layers."""
        return f"{self.body}.{name}" if self.body else name


def base_layers(base: BaseSpec) -> BaseLayers | None:
    """Find the layers by their attention modules; None if those aren't in one list."""
    layers = []
    bodies = set()
    for attention in base.attention:
        match = _LAYER.match(attention)
        if match is None:
            return None
        stack, body, index = match[1], match[2] or "", int(match[3])
        bodies.add((body, stack))
        layers.append(Layer(index, f"{stack}.{index}", attention, _places(base, f"{stack}.{index}")))
    if len(bodies) != 1 or len({layer.index for layer in layers}) != len(layers):
        return None
    return BaseLayers(next(iter(bodies))[0], tuple(layers))


def _places(base: BaseSpec, layer: str) -> frozenset[str]:
    """Places whose part ends in a linear module of its own. Where a norm comes between the two, as in
    Gemma, the library's adapters work before the norm (adapters/methods/bottleneck.py, init_bottleneck)."""
    return frozenset(
        name.removeprefix(f"{layer}.")
        for name, site in base.residual.items()
        if site.layer == layer and any(linear.startswith(f"{site.part}.") for linear in base.linears)
    )
