"""Replaces the `forward` of a base's decoder layers by one C++ operator.

A layer is recognised by its parts, which our operators have replaced by then. It is fused only if the
operator gives the same results on random rows, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from polygraft.base.optimize.fused_model import FusedModel, find_fused_model
from polygraft.base.optimize.trial_step import trial_step
from polygraft.layers.attention import PagedAttention, attached
from polygraft.layers.decoder_layer import FusedDecoderLayer
from polygraft.layers.fused import FusedMlp, FusedRmsNorm
from polygraft.layers.linear.linear import LinearGroup, PackedLinear
from polygraft.layers.native.kernels import Kernels
from polygraft.layers.replaced.norms import AdaptedNorm
from polygraft.layers.residual.bottlenecks import BottleneckSite
from polygraft.layers.step import StepContext

_Norm = AdaptedNorm | FusedRmsNorm | None


def fuse_decoder_layers(
    model: PreTrainedModel,
    sites: Mapping[str, Sequence[BottleneckSite]],
    step: StepContext,
    kernels: Kernels | None,
) -> FusedModel | None:
    """Fuse the layers that the operator can compute; their modules stay where they are.

    The paged cache must be attached and empty: its first blocks are written.

    Args:
        sites: of bottleneck adapters, by the name of the layer.

    Returns:
        The model with all layers in one call, if it can be computed so; else None, and each fused layer is
        one call.
    """
    if kernels is None:
        return None
    fused: dict[nn.Module, FusedDecoderLayer] = {}
    for name, layer in model.named_modules():
        candidate = _candidate(layer, sites.get(name, ()), step, kernels)
        if candidate is not None and _agree(layer, candidate, step):
            layer.forward = fused[layer] = candidate
    return find_fused_model(model, fused, step, kernels) if fused else None


def _candidate(
    layer: nn.Module, sites: Sequence[BottleneckSite], step: StepContext, kernels: Kernels
) -> FusedDecoderLayer | None:
    mlp, self_attn = getattr(layer, "mlp", None), getattr(layer, "self_attn", None)
    if not isinstance(mlp, FusedMlp) or not isinstance(self_attn, nn.Module):
        return None
    attention = attached(self_attn)
    norms = _norms(layer, self_attn)
    groups = (
        _group(self_attn, "q_proj", "k_proj", "v_proj"),
        _group(self_attn, "o_proj"),
        _group(mlp, "gate_proj", "up_proj"),
        _group(mlp, "down_proj"),
    )
    found = [group for group in groups if group is not None]
    if attention is None or attention.kernels is None or norms is None or len(found) < len(groups):
        return None
    if not _fit(attention, norms, found):
        return None
    return FusedDecoderLayer(layer.forward, attention, norms, found, sites, mlp.activation, step, kernels)


def _norms(layer: nn.Module, self_attn: nn.Module) -> list[_Norm] | None:
    """A layer's norms as `FusedDecoderLayer` takes them: Llama has two around its parts, Gemma four."""
    outer = [getattr(layer, name, None) for name in ("input_layernorm", "post_attention_layernorm")]
    further = [
        getattr(layer, name, None) for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    ]
    inner = [getattr(self_attn, name, None) for name in ("q_norm", "k_norm")]
    norms = [outer[0], None, outer[1], None] if further == [None, None] else outer + further
    needed = [norm for norm in norms if norm is not None]
    norms += inner
    bare = [norm.base_layer if isinstance(norm, AdaptedNorm) else norm for norm in norms]
    if len(needed) not in (2, 4) or not all(n is None or isinstance(n, FusedRmsNorm) for n in bare):
        return None
    return norms


def _group(parent: nn.Module, *names: str) -> LinearGroup | None:
    """The group of exactly these modules, in this order; None if there is none."""
    modules = [getattr(parent, name, None) for name in names]
    first = modules[0]
    if not isinstance(first, PackedLinear) or len(first.group.widths) != len(names):
        return None
    for member, module in enumerate(modules):
        if not isinstance(module, PackedLinear) or module.group is not first.group or module.member != member:
            return None
    return first.group


def _fit(attention: PagedAttention, norms: list[_Norm], groups: list[LinearGroup]) -> bool:
    """Whether each part reads the width that the one before it returns: the operator checks no widths."""
    site, (qkv, o, gate_up, down) = attention.site, groups
    hidden, inner = qkv.in_features, down.in_features
    values = site.heads * site.value_dim
    return (
        qkv.widths
        == [site.heads * site.head_dim, site.kv_heads * site.head_dim, site.kv_heads * site.value_dim]
        and (o.in_features, o.widths) == (values, [hidden])
        and (gate_up.in_features, gate_up.widths) == (hidden, [inner, inner])
        and down.widths == [hidden]
        and site.head_dim % 2 == 0
        and len({group.dtype for group in groups} | {attention.key_cache.dtype}) == 1
        and all(
            norm is None or len(norm.scale) == width
            for norm, width in zip(norms, [hidden] * 4 + [site.head_dim] * 2, strict=True)
        )
    )


def _agree(layer: nn.Module, candidate: FusedDecoderLayer, step: StepContext) -> bool:
    """Whether both give the same results on random rows of one sequence, to the bit."""
    cache = candidate.attention.key_cache
    generator = torch.Generator().manual_seed(0)
    try:
        with trial_step(step, cache) as rows:
            x, cos, sin = (
                torch.randn(1, rows, width, generator=generator).to(cache.dtype)
                for width in (candidate.hidden_size, cache.shape[2], cache.shape[2])
            )
            theirs, mine = (
                forward(
                    x,
                    attention_mask=torch.zeros(1, 1, 1, 1),
                    position_ids=torch.arange(rows)[None],
                    position_embeddings=(cos, sin),
                )
                for forward in (layer.forward, candidate)
            )
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(theirs, torch.Tensor) and isinstance(mine, torch.Tensor) and torch.equal(mine, theirs)
