"""Invertible adapters (arXiv 2005.00052): NICE's coupling, compiled to Coupling.

`a += F(b); b += G(a)` behind the embeddings, and back before the head, where F and G are a linear layer, the
bottlenecks' activation and another one (adapters/methods/modeling.py, NICECouplingBlock). The inverse
belongs to the library's classes with flexible heads, such as LlamaAdapterModel, and to models that it serves
by hooks, such as Qwen2ForCausalLM (adapters/methods/invertible.py). LlamaForCausalLM, MistralForCausalLM and
GPT2LMHeadModel don't have it there: adapters from these run without.
"""

from __future__ import annotations

import torch

from polygraft.adapters.adapterhub.non_linearity import PRELU, take_slope, without_prelu
from polygraft.adapters.adapterhub.options import Options
from polygraft.adapters.adapterhub.source import Source
from polygraft.core.primitives import Coupling, CouplingLayers

_STATIC_HEADS = ("gpt2", "gptj", "llama", "mistral")
"""Model types of the library's own attention and layers; only their flexible heads invert."""
_SCALED_LATER = ("gemma", "gemma2")
"""Their models multiply the embeddings after the library's hook on them."""


def inverts_before_head(model_type: str, model_class: str) -> bool:
    """Whether the class that an adapter was saved from inverts its coupling."""
    return model_type not in _STATIC_HEADS or model_class.endswith("AdapterModel")


def take_coupling(source: Source, options: Options, activation: str | None) -> Coupling | None:
    """Take the invertible adapter of a method; None without one, or after noting a problem."""
    block = options.take("inv_adapter", str, None)
    factor = options.take("inv_adapter_reduction_factor", (int, float), None)
    hidden = source.base.hidden_size
    if not block:
        return None
    if block == "glow":
        options.refuse("inv_adapter", block, "isn't served: the library's own block can't run on sequences")
        return None
    if block != "nice":
        options.refuse("inv_adapter", block, "isn't known")
        return None
    if not source.base.residual:
        options.refuse("inv_adapter", block, "isn't served on a base whose layers don't add up their parts")
        return None
    if source.base.architecture in _SCALED_LATER:
        options.refuse("inv_adapter", block, "isn't served on a base that scales its embeddings afterwards")
        return None
    if hidden % 2:
        options.refuse("inv_adapter", block, f"isn't served with an odd hidden size ({hidden})")
        return None
    if factor is None or not 0 < factor <= hidden // 2:
        options.refuse("inv_adapter_reduction_factor", factor, "makes no sense")
        return None
    if activation is None:
        return None
    width = int(hidden // 2 // factor)
    f = _function(source, "F", width, activation)
    g = _function(source, "G", width, activation)
    if f is None or g is None:
        return None
    return Coupling(f, g, "relu" if activation == PRELU else activation, inverted=source.inverts)


def _function(source: Source, letter: str, width: int, activation: str) -> CouplingLayers | None:
    half = source.base.hidden_size // 2
    module = source.layers.shared(f"invertible_adapters.{source.name}.{letter}")
    take, computes_up = source.reader.take, activation == PRELU
    down = take(f"{module}.0.weight", (width, half))
    up = take(f"{module}.2.weight", (half, width), wide=computes_up)
    down_bias = take(f"{module}.0.bias", (width,), wide=True)
    up_bias = take(f"{module}.2.bias", (half,), wide=True)
    slope = take_slope(source, f"{module}.1") if activation == PRELU else 0.0
    if down is None or up is None or down_bias is None or up_bias is None or slope is None:
        return None
    if activation == PRELU:
        down, both, up = without_prelu(down, down_bias, up, slope)
        assert both is not None
        down_bias = both
        up = source.reader.keep(up, module)
        if up is None:
            return None
    dtype = torch.promote_types(down.dtype, up.dtype)
    return CouplingLayers(down.to(dtype).contiguous(), down_bias, up.to(dtype).contiguous(), up_bias)
