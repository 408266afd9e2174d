"""Finds where a base's layers add to the residual stream: bottleneck adapters work at these sites.

A layer has two sites if it adds the output of one part to its input, adds the output of another part to that
sum, and returns the result, as Llama, Gemma and GPT-2 do. Layers whose two parts read the same input, or that
scale what they add, have none. The sums of a recorded forward decide, not the modules' names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from polygraft.base.inspect.trace import Call, Trace
from polygraft.core.spec import ResidualSite

ATTENTION, FEED_FORWARD = "attention", "feed_forward"


def site_name(layer: str, place: str) -> str:
    """How adapters name a site, such as "model.layers.0.attention"."""
    return f"{layer}.{place}"


def find_residual_sites(trace: Trace) -> Mapping[str, ResidualSite]:
    """Return the sites of all members of a model's module lists, by name."""
    # In the order of first calls; of a module that was called more than once, the last call counts.
    called = {
        call.module: call
        for call in trace.calls
        if call.hidden_states is not None and call.output is not None
    }
    order = {module: at for at, module in enumerate(called)}
    sites: dict[str, ResidualSite] = {}
    for list_name, layers in trace.model.named_modules():
        if not isinstance(layers, nn.ModuleList):
            continue
        for index, layer in enumerate(layers):
            if layer in called:
                children = [(name, child) for name, child in layer.named_children() if child in called]
                children.sort(key=lambda child: order[child[1]])
                parts = [(name, called[child]) for name, child in children]
                sites |= _sites_of(trace, f"{list_name}.{index}", called[layer], parts)
    return sites


def _sites_of(
    trace: Trace, name: str, layer: Call, parts: Sequence[tuple[str, Call]]
) -> dict[str, ResidualSite]:
    """Return the two sites of one layer, or nothing.

    Args:
        parts: the layer's children and their calls.
    """
    first = _added(trace, layer.hidden_states, parts)
    second = None if first is None else _added(trace, first[1], parts)
    if first is None or second is None or second[1] is not layer.output:
        return {}
    return {
        site_name(name, ATTENTION): ResidualSite(name, f"{name}.{first[0]}", first=True),
        site_name(name, FEED_FORWARD): ResidualSite(name, f"{name}.{second[0]}", first=False),
    }


def _added(
    trace: Trace, stream: torch.Tensor | None, parts: Sequence[tuple[str, Call]]
) -> tuple[str, torch.Tensor] | None:
    """Return the part whose output is added to the stream, and the sum."""
    for name, call in parts:
        if stream is not None and call.output is not None:
            total = trace.sum_of(stream, call.output)
            if total is not None:
                return name, total
    return None
