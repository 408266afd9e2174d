"""Attention over the paged cache, plugged into the base through transformers' AttentionInterface.

The step's rows come as one packed sequence; where each belongs is in the step's plan. Semantics that the
modules pass as arguments (scaling, sliding window, soft-cap, sinks) are per layer and are read from the
call, as transformers' own implementations do.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from polygraft.core.spec import AttentionSite
from polygraft.errors import UnsupportedArchitecture
from polygraft.layers.masks import carry_rule, window_of
from polygraft.layers.native.kernels import DTYPES, Kernels
from polygraft.layers.native.structures import LayerStruct
from polygraft.layers.step import AttentionPlan, StepContext

NAME = "polygraft"
_ATTRIBUTE = "polygraft_attention"
# Arguments that don't change the result here: positions are already in q and k, and nothing is trained.
_IGNORED = {
    "position_ids", "dropout", "is_causal", "use_cache", "output_attentions", "cache_position",
    "output_router_logits", "output_hidden_states", "logits_to_keep", "layer_idx", "training",
    "position_embeddings", "attention_mask", "return_dict",
}  # fmt: skip


class Probe:
    """Stands in an attention layer before there is a cache: records the call, and lets each row see itself.

    So whatever a row takes from another one, it takes outside attention.
    """

    def __init__(self) -> None:
        self.site: AttentionSite | None = None

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        site: AttentionSite,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Rows [1, heads, rows, head_dim] to [1, rows, heads, value_dim]."""
        self.site = site
        return v.repeat_interleave(site.heads // site.kv_heads, 1).transpose(1, 2)


class PagedAttention:
    """One layer's part of the paged cache, and the attention over it.

    Args:
        key_cache: [blocks, kv_heads, head_dim, block_size]
        value_cache: [blocks, kv_heads, block_size, value_dim]
        kernels: None runs the operator in torch.
        index: among the attention layers.
    """

    def __init__(
        self,
        site: AttentionSite,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        step: StepContext,
        kernels: Kernels | None,
        index: int = 0,
    ) -> None:
        self.site = site
        self.index = index
        self.key_cache = key_cache
        self.value_cache = value_cache
        self.step = step
        usable = kernels is not None and key_cache.dtype in DTYPES
        self.kernels = kernels if usable else None
        self._struct = LayerStruct(
            key_cache.data_ptr(), value_cache.data_ptr(), site.heads, site.kv_heads, site.head_dim,
            site.value_dim, key_cache.shape[3], site.window, None, site.scaling, site.softcap,
            index,
        )  # fmt: skip
        self._sinks: torch.Tensor | None = None

    @property
    def address(self) -> int:
        """Of attention.h's `Layer`."""
        return ctypes.addressof(self._struct)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        site: AttentionSite,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """[1, heads, rows, head_dim] to [1, rows, heads, value_dim]; k and v go into the cache first."""
        plan = self.step.attention
        assert plan is not None, "attention outside a step"
        dtype = self.key_cache.dtype
        if self.kernels is None or q.dtype != dtype or k.dtype != dtype or v.dtype != dtype:
            out = paged_attention_torch(
                q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1),
                self.key_cache, self.value_cache, plan, self.site, sinks, self.index,
            )  # fmt: skip
            return out[None].to(q.dtype)
        if sinks is not None and self._sinks is None:
            self._sinks = sinks.detach().float().contiguous()
            self._struct.sinks = self._sinks.data_ptr()
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        out = torch.empty(1, q.shape[2], self.site.heads, self.site.value_dim, dtype=dtype)
        self.kernels.paged_attention(
            DTYPES[dtype], self.address, ctypes.addressof(plan.native()),
            q.data_ptr(), q.stride(2), q.stride(1), k.data_ptr(), k.stride(2), k.stride(1),
            v.data_ptr(), v.stride(2), v.stride(1), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out


def paged_attention_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    plan: AttentionPlan,
    site: AttentionSite,
    sinks: torch.Tensor | None,
    layer: int = 0,
) -> torch.Tensor:
    """The operator in torch: reference for the C++ one, and what other devices run.

    Args:
        q: [rows, heads, head_dim]; k: [rows, kv_heads, head_dim]; v: [rows, kv_heads, value_dim].
        sinks: [heads], logits of a key without a value.
        layer: its index among the attention layers.

    Returns:
        float32 [rows, heads, value_dim].
    """
    size = key_cache.shape[3]
    block, offset = plan.slot_mapping // size, plan.slot_mapping % size
    key_cache[block, :, :, offset] = k.to(key_cache.dtype)
    value_cache[block, :, offset] = v.to(value_cache.dtype)
    starts = plan.query_start.tolist()
    rows_out = []
    for s, (context, prefix) in enumerate(
        zip(plan.context_lens.tolist(), plan.prefix_lens.tolist(), strict=True)
    ):
        first, last = starts[s], starts[s + 1]
        shared = -(-prefix // size)
        blocks = shared + -(-(context - prefix) // size)
        table = plan.block_tables[s, :blocks].long()
        # [kv_heads, blocks * block_size, dim], then without the gap behind the prefix.
        keys = key_cache[table].permute(1, 0, 3, 2).flatten(1, 2)
        values = value_cache[table].permute(1, 0, 2, 3).flatten(1, 2)
        first_key = prefix if plan.bare is not None and plan.bare[s, layer] else 0
        own_slots = torch.arange(context - prefix) + shared * size
        keep = torch.cat([torch.arange(first_key, prefix), own_slots]).to(q.device)
        group = site.heads // site.kv_heads
        keys = keys[:, keep].float().repeat_interleave(group, 0)
        values = values[:, keep].float().repeat_interleave(group, 0)
        scores = q[first:last].float().transpose(0, 1) @ keys.transpose(1, 2) * site.scaling
        if site.softcap:
            scores = site.softcap * torch.tanh(scores / site.softcap)
        own = torch.arange(context - (last - first), context, device=q.device)[:, None]
        other = torch.arange(first_key, context, device=q.device)[None, :]
        hidden = other > own
        if site.window:
            hidden |= other <= own - site.window
        scores = scores.masked_fill(hidden, -math.inf)
        if sinks is not None:
            sink = sinks.float()[:, None, None].expand(-1, last - first, 1)
            weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        rows_out.append((weights @ values).transpose(0, 1))
    return torch.cat(rows_out)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """What transformers calls for every attention layer; [1, heads, rows, dim] to [1, rows, heads, dim].

    Raises:
        UnsupportedArchitecture: an argument that changes the result and isn't known here, or, while the base
            is inspected, a layer that isn't causal within a window.
    """
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in _IGNORED)
    if unknown:
        raise UnsupportedArchitecture(
            f"{type(module).__name__} passes arguments to its attention that aren't served: "
            + ", ".join(unknown)
        )
    attention = attached(module)
    if attention is not None:
        return attention(query, key, value, attention.site, s_aux), None
    who = type(module).__name__
    if not getattr(module, "is_causal", True):
        raise UnsupportedArchitecture(f"{who} attends in both directions, which isn't served")
    handler = Probe()
    site = AttentionSite(
        heads=query.shape[1],
        kv_heads=key.shape[1],
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        scaling=query.shape[3] ** -0.5 if scaling is None else float(scaling),
        window=window_of(attention_mask, sliding_window, who),
        softcap=softcap or 0.0,
    )
    setattr(module, _ATTRIBUTE, handler)
    return handler(query, key, value, site, s_aux), None


def register() -> None:
    """Make `attn_implementation="polygraft"` known to transformers; once or often is the same."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, carry_rule)


def probed_sites(model: nn.Module) -> dict[str, AttentionSite]:
    """The attention layers that a forward has reached, by module name, in the model's order."""
    return {
        name: handler.site
        for name, module in model.named_modules()
        if isinstance(handler := getattr(module, _ATTRIBUTE, None), Probe) and handler.site is not None
    }


def attached(module: nn.Module) -> PagedAttention | None:
    """An attention layer's part of the cache, or None if it has none."""
    handler = getattr(module, _ATTRIBUTE, None)
    return handler if isinstance(handler, PagedAttention) else None


def attach(model: nn.Module, name: str, attention: PagedAttention) -> None:
    """Give an attention layer its part of the cache."""
    setattr(model.get_submodule(name), _ATTRIBUTE, attention)
