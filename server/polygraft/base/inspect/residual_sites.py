"""Finds where a base's layers add to the residual stream: the places that bottleneck adapters work at.

A layer has them if it adds one part's output to its input, and another's to the sum, which is what it
returns: Llama, Gemma and GPT-2 are all made so. Layers whose two parts read the same input, or that scale
what they add, have none. The sums are watched while a few rows run, on whatever device: no name decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from polygraft.core.spec import ResidualSite

ATTENTION, FEED_FORWARD = "attention", "feed_forward"
_ADDITIONS = {torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__, torch.add}


def site_name(layer: str, place: str) -> str:
    """How adapters name a site, such as "model.layers.0.attention"."""
    return f"{layer}.{place}"


class WatchSums(TorchFunctionMode):
    """While it is entered, notes what the members of a model's lists of layers read, give and add up."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._layers = {
            f"{name}.{index}": layer
            for name, layers in model.named_modules()
            if isinstance(layers, nn.ModuleList)
            for index, layer in enumerate(layers)
        }
        self._inputs: dict[str, torch.Tensor] = {}
        self._outputs: dict[str, torch.Tensor] = {}
        # Ids stand for one tensor each as long as all of them are held.
        self._sums: dict[tuple[int, int], torch.Tensor] = {}
        self._held: list[object] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> WatchSums:
        for name, layer in self._layers.items():
            self._watch(name, layer)
            for child, module in layer.named_children():
                self._watch(f"{name}.{child}", module)
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's own has no types
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # nor has this one
        for hook in self._hooks:
            hook.remove()

    def _watch(self, name: str, module: nn.Module) -> None:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            x = args[0] if args else kwargs.get("hidden_states")
            y = out[0] if isinstance(out, tuple) else out
            if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
                self._inputs[name], self._outputs[name] = x, y

        self._hooks.append(module.register_forward_hook(note, with_kwargs=True))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ADDITIONS and not kwargs and all(isinstance(x, torch.Tensor) for x in args[:2]):
            self._held += args
            self._sums[id(args[0]), id(args[1])] = self._sums[id(args[1]), id(args[0])] = out
        return out

    def sites(self) -> Mapping[str, ResidualSite]:
        """What was found, by name."""
        found: dict[str, ResidualSite] = {}
        for layer in self._layers:
            x, y = self._inputs.get(layer), self._outputs.get(layer)
            if x is None or y is None:
                continue
            first = self._added(layer, x)
            second = None if first is None else self._added(layer, first[1])
            if first is not None and second is not None and second[1] is y:
                found[site_name(layer, ATTENTION)] = ResidualSite(layer, first[0], first=True)
                found[site_name(layer, FEED_FORWARD)] = ResidualSite(layer, second[0], first=False)
        return found

    def _added(self, layer: str, stream: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """The part of a layer whose output is added to the stream, and the sum."""
        for name, output in self._outputs.items():
            if _parent(name) == layer and (id(stream), id(output)) in self._sums:
                return name, self._sums[id(stream), id(output)]
        return None


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
