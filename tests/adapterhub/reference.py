"""Primitives in plain torch on a transformers model, one request at a time: what the library is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedModel

from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.primitives import LowRank, Prefix, Scale
from polygraft.core.residual_primitives import Bottleneck, Coupling, CouplingLayers
from polygraft.core.spec import BaseSpec, ResidualSite
from polygraft.layers.residual.activations import ACTIVATIONS

ATTENTION = "prefix_reference"


def bottleneck(primitive: Bottleneck, r: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The residual stream behind a site."""
    x = {"sum": r + h, "output": h, "residual": r}[primitive.reads]
    if primitive.normalizes:
        x = F.layer_norm(x, x.shape[-1:])
    inner = ACTIVATIONS[primitive.activation](F.linear(x, primitive.down, primitive.down_bias))
    out = F.linear(primitive.scaling * inner, primitive.up, primitive.up_bias)
    after = primitive.norm_after
    if after is None:
        return primitive.residual * r + h + out
    skip = r + h if after.skip == "sum" else h
    out = F.layer_norm(out + skip if after.inside else out, out.shape[-1:], after.weight, after.bias)
    return primitive.residual * r + (out if after.inside else out + skip)


def coupling(primitive: Coupling, x: torch.Tensor, *, inverse: bool) -> torch.Tensor:
    """The halves of x, each changed by the other."""

    def function(layers: CouplingLayers, half: torch.Tensor) -> torch.Tensor:
        inner = ACTIVATIONS[primitive.activation](F.linear(half, layers.down, layers.down_bias))
        return F.linear(inner, layers.up, layers.up_bias)

    a, b = x.chunk(2, dim=-1)
    if inverse:
        b = b - function(primitive.g, a)
        return torch.cat([a - function(primitive.f, b), b], dim=-1)
    a = a + function(primitive.f, b)
    return torch.cat([a, b + function(primitive.g, a)], dim=-1)


def linear(low_rank: LowRank | None, scale: Scale | None, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What an adapted module gives."""
    out: torch.Tensor = type(module).forward(module, x)
    if low_rank is not None and low_rank.magnitude is not None:
        # DoRA on a module without a bias: the rows of W + B A are brought to norms that were learnt.
        weight = module.weight + low_rank.product  # type: ignore[operator]
        return F.linear(x, weight * (low_rank.magnitude / weight.norm(dim=1))[:, None])
    if scale is not None and scale.output is not None:
        assert scale.after_bias
        out = out * scale.output
    if low_rank is not None:
        out = out + F.linear(low_rank.scaling * F.linear(x, low_rank.a), low_rank.b, low_rank.bias)
    return out


class _Prefixes:
    """The attention that transformers calls, with one prefix at a time."""

    def __init__(self) -> None:
        self.prefix: Prefix | None = None

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        rows, layer = query.shape[2], module.layer_idx
        if self.prefix is not None:
            own = (self.prefix.keys[layer], self.prefix.values[layer])
            key, value = (
                torch.cat([prefix.transpose(0, 1)[None], theirs], dim=2)
                for prefix, theirs in zip(own, (key, value), strict=True)
            )
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = query @ key.transpose(-1, -2) * scaling
        before = key.shape[2] - rows
        visible = torch.ones(rows, key.shape[2], dtype=torch.bool).tril(before)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None


PREFIXES = _Prefixes()
AttentionInterface.register(ATTENTION, PREFIXES)


@contextmanager
def adapted(model: PreTrainedModel, base: BaseSpec, compiled: AdapterWeights) -> Iterator[None]:
    """The model with an adapter's primitives in it; its attention implementation must be `ATTENTION`."""
    handles: list[RemovableHandle] = []
    assert set(compiled.bottlenecks) <= set(base.residual)
    if compiled.coupling is not None:  # before the hooks that follow the stream
        first = next(iter(base.residual.values())).layer
        handles.append(_couple(model.get_submodule(first), compiled.coupling, inverse=False))
        if compiled.coupling.inverted:
            handles.append(_couple(model.get_output_embeddings(), compiled.coupling, inverse=True))
    streams: dict[str, torch.Tensor] = {}
    for name, where in base.residual.items():
        handles += _site(model, where, compiled.bottlenecks.get(name), streams)
    changed = {*compiled.each("low_rank"), *compiled.each("scale")}
    for name in changed:
        _replace(
            model.get_submodule(name), compiled.each("low_rank").get(name), compiled.each("scale").get(name)
        )
    assert compiled.prefix is None or isinstance(compiled.prefix, Prefix)
    PREFIXES.prefix = compiled.prefix
    try:
        yield
    finally:
        PREFIXES.prefix = None
        for handle in handles:
            handle.remove()
        for name in changed:
            del model.get_submodule(name).forward


def _site(
    model: PreTrainedModel,
    where: ResidualSite,
    primitive: Bottleneck | None,
    streams: dict[str, torch.Tensor],
) -> list[RemovableHandle]:
    """Hooks that follow the stream through one site, and change what is added there."""

    def enter(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        streams[where.layer] = args[0] if args else kwargs["hidden_states"]

    def leave(module: nn.Module, args: Any, out: Any) -> Any:
        h = out[0] if isinstance(out, tuple) else out
        r = streams[where.layer]
        streams[where.layer] = r + h
        if primitive is None:
            return None
        streams[where.layer] = bottleneck(primitive, r.float(), h.float()).to(h.dtype)
        h = streams[where.layer] - r  # the layer itself adds r
        return (h, *out[1:]) if isinstance(out, tuple) else h

    handles = [model.get_submodule(where.part).register_forward_hook(leave)]
    if where.first:
        handles.append(model.get_submodule(where.layer).register_forward_pre_hook(enter, with_kwargs=True))
    return handles


def _replace(module: nn.Module, low_rank: LowRank | None, scale: Scale | None) -> None:
    module.forward = lambda x: linear(low_rank, scale, module, x)  # type: ignore[method-assign]


def _couple(module: nn.Module, primitive: Coupling, *, inverse: bool) -> RemovableHandle:
    def change(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (coupling(primitive, args[0].float(), inverse=inverse).to(args[0].dtype), *args[1:])

    return module.register_forward_pre_hook(change)
