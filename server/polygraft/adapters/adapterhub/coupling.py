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
from polygraft.adapters.files.problems import all_of
from polygraft.core.residual_primitives import Coupling, CouplingLayers

_STATIC_HEADS = ("gpt2", "gptj", "llama", "mistral")
"""Model types of the library's own attention and layers; only their flexible heads invert."""
_SCALED_LATER = ("gemma", "gemma2")
"""Their models multiply the embeddings after the library's hook on them."""


def inverts_before_head(model_type: str, model_class: str) -> bool:
    """Whether the class that an adapter was saved from inverts its coupling."""
    return model_type not in _STATIC_HEADS or model_class.endswith("AdapterModel")


def take_coupling(source: Source, options: Options, activation: str) -> Coupling | None:
    """Take the invertible adapter of a method; None without one. Raises Problem."""
    block = options.take("inv_adapter", str, None)
    factor = options.take("inv_adapter_reduction_factor", (int, float), None)
    hidden = source.base.hidden_size
    if not block:
        return None
    why = _why_not(source, block)
    if why:
        raise options.problem("inv_adapter", block, why)
    if factor is None or not 0 < factor <= hidden // 2:
        raise options.problem("inv_adapter_reduction_factor", factor, "isn't valid")
    width = int(hidden // 2 // factor)
    f, g = all_of(
        lambda: _function(source, "F", width, activation), lambda: _function(source, "G", width, activation)
    )
    return Coupling(f, g, "relu" if activation == PRELU else activation, inverted=source.inverts)


def _why_not(source: Source, block: str) -> str:
    """Why a kind of invertible adapter isn't served on this base; empty if it is."""
    hidden = source.base.hidden_size
    reasons = {
        "isn't served: the library's own block can't run on sequences": block == "glow",
        "isn't known": block not in ("glow", "nice"),
        "isn't served on a base whose layers don't add up their parts": not source.base.residual,
        "isn't served on a base that scales its embeddings afterwards": (
            source.base.architecture in _SCALED_LATER
        ),
        f"isn't served with an odd hidden size ({hidden})": hidden % 2 > 0,
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def _function(source: Source, letter: str, width: int, activation: str) -> CouplingLayers:
    """Take one half's function. Raises Problem."""
    half, reader = source.base.hidden_size // 2, source.reader
    module = source.layers.shared(f"invertible_adapters.{source.name}.{letter}")
    down, up, down_bias, up_bias = all_of(
        lambda: reader.take(f"{module}.0.weight", (width, half)),
        lambda: reader.take(f"{module}.2.weight", (half, width), wide=activation == PRELU),
        lambda: reader.take(f"{module}.0.bias", (width,), wide=True),
        lambda: reader.take(f"{module}.2.bias", (half,), wide=True),
    )
    if activation == PRELU:
        down, both, up = without_prelu(down, down_bias, up, take_slope(source, f"{module}.1"))
        assert both is not None
        down_bias, up = both, reader.keep(up, module)
    dtype = torch.promote_types(down.dtype, up.dtype)
    return CouplingLayers(down.to(dtype).contiguous(), down_bias, up.to(dtype).contiguous(), up_bias)
