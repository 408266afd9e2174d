"""Tiny models of the architectures beside those of `tiny.py`, each with what sets it apart switched on.

Windows are shorter than the tests' contexts, soft-caps and sinks are as large as attention's own logits, a part
of the heads' dimensions isn't rotated where an architecture can leave one out, and so on: what a server that
ignores them would get wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}
WINDOW = 8
"""Keys that a sliding layer sees, its own included."""
_SLIDING = {"sliding_window": WINDOW}
_MIXED = {**_SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
_ALL_FULL = {"layer_types": ["full_attention"] * 2}
EXPERTS = 4

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_LLAMA = (*_ATTENTION, *_GATED)
_NEOX = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
_FAIRSEQ = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def _experts(count: str, **widths: int) -> dict[str, Any]:
    return {count: EXPERTS, "num_experts_per_tok": 2, **widths}


def _rotated(part: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": part}}


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Args:
        config: beside what every tiny model has.
        targets: all linear modules but the head, by their last names: what the tests' LoRA adapts.
        off: settings each of which switches off something that sets it apart, and so must change its answers.
        untargeted: linear modules that PEFT can't adapt.
        prompt: what PEFT must be told for prompt tuning, since it guesses wrong.
        has_prefixes: whether keys and values have one width, as prefix tuning needs them to.
    """

    config: Mapping[str, Any]
    targets: tuple[str, ...]
    off: tuple[Mapping[str, Any], ...] = ()
    untargeted: tuple[str, ...] = ()
    prompt: Mapping[str, Any] = field(default_factory=dict)
    has_prefixes: bool = True


LONG = 64
"""Tokens up to which the long RoPE below is plain."""
# Four factors for the eight of sixteen dimensions that are rotated.
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": LONG,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [2.0, 3.0, 5.0, 9.0],
}

MATRIX: dict[str, Architecture] = {
    "mistral": Architecture({**_GROUPED, **_SLIDING}, _LLAMA, off=({"sliding_window": None},)),
    "mixtral": Architecture(
        {**_GROUPED, **_SLIDING, **_experts("num_local_experts")},
        _ATTENTION,
        off=({"sliding_window": None}, {"num_experts_per_tok": 1}),
    ),
    "qwen3": Architecture(
        {**_GROUPED, "head_dim": 32, "use_sliding_window": True, **_MIXED}, _LLAMA, off=(_ALL_FULL,)
    ),
    # The second layer's feed-forward is a plain one. PEFT takes its modules' names for the experts' parts, which
    # they were before transformers 5, and adapts those parameters instead (peft/utils/
    # transformers_weight_conversion.py), so nothing can be made for it.
    "qwen3_moe": Architecture(
        {
            **_GROUPED,
            "head_dim": 16,
            "use_sliding_window": True,
            **_SLIDING,
            "mlp_only_layers": [1],
            **_experts("num_experts", moe_intermediate_size=48),
        },
        _ATTENTION,
        off=({"sliding_window": None}, {"norm_topk_prob": True}),
        untargeted=_GATED,
    ),
    "gemma2": Architecture(
        {
            **_GROUPED,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 4.0,
            **_MIXED,
        },
        _LLAMA,
        off=(
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
            {"query_pre_attn_scalar": 32},
            _ALL_FULL,
        ),
    ),
    "phi3": Architecture(
        {
            **_GROUPED,
            "sliding_window": 24,
            "rope_parameters": _LONG_ROPE,
            "original_max_position_embeddings": LONG,
        },
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        off=(
            {"sliding_window": None},
            {"rope_parameters": {**_LONG_ROPE, "short_factor": [1.0] * 4}},
            {
                "rope_parameters": {
                    **_LONG_ROPE,
                    "partial_rotary_factor": 1.0,
                    "short_factor": [1.0] * 8,
                    "long_factor": [1.0] * 8,
                }
            },
        ),
    ),
    "gpt_neox": Architecture(
        {**_SHAPE, **_rotated(0.5), "use_parallel_residual": True},
        _NEOX,
        off=(_rotated(1.0), {"use_parallel_residual": False}),
    ),
    # Embeddings are narrower than the layers.
    "opt": Architecture(
        {
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 32,
        },
        (*_FAIRSEQ, "project_in", "project_out"),
        prompt={"token_dim": 32},
    ),
    "starcoder2": Architecture(
        {**_GROUPED, **_SLIDING}, (*_ATTENTION, "c_fc", "c_proj"), off=({"sliding_window": None},)
    ),
    "cohere2": Architecture(
        {**_GROUPED, "logit_scale": 0.25, **_MIXED}, _LLAMA, off=(_ALL_FULL, {"logit_scale": 1.0})
    ),
    "olmo2": Architecture(_GROUPED, _LLAMA),
    "granite": Architecture(
        {
            **_GROUPED,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
        _LLAMA,
        off=(
            {"embedding_multiplier": 1.0},
            {"residual_multiplier": 1.0},
            {"attention_multiplier": 0.25},
            {"logits_scaling": 1.0},
        ),
    ),
    # The second layer has no rotary positions.
    "smollm3": Architecture(
        {**_GROUPED, "no_rope_layers": [1, 0]}, _LLAMA, off=({"no_rope_layers": [1, 1]},)
    ),
    "gpt_oss": Architecture(
        {**_GROUPED, "head_dim": 16, **_experts("num_local_experts"), **_MIXED}, _ATTENTION, off=(_ALL_FULL,)
    ),
    "glm4": Architecture(
        {**_GROUPED, "head_dim": 16, **_rotated(0.5), "attention_bias": True},
        (*_ATTENTION, "gate_up_proj", "down_proj"),
        off=(_rotated(1.0),),
    ),
}

SMOKE: dict[str, Architecture] = {
    # Its window is in its masks alone.
    "qwen2_moe": Architecture(
        {
            **_GROUPED,
            "use_sliding_window": True,
            **_MIXED,
            **_experts("num_experts", moe_intermediate_size=48, shared_expert_intermediate_size=80),
        },
        (*_LLAMA, "shared_expert_gate"),
        off=(_ALL_FULL,),
    ),
    "gemma": Architecture({**_GROUPED, "head_dim": 32}, _LLAMA),
    "phi": Architecture(
        {**_GROUPED, **_rotated(0.5), "qk_layernorm": True},
        ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
        off=(_rotated(1.0),),
    ),
    # One head of keys and values for all.
    "gpt_bigcode": Architecture(
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}, ("c_attn", "c_proj", "c_fc")
    ),
    "exaone4": Architecture({**_GROUPED, **_MIXED}, _LLAMA, off=(_ALL_FULL,)),
    "ernie4_5": Architecture({**_GROUPED, "head_dim": 16, "use_bias": True}, _LLAMA),
    "helium": Architecture({**_GROUPED, "head_dim": 16}, _LLAMA),
    "nemotron": Architecture(
        {**_GROUPED, **_rotated(0.5)}, (*_ATTENTION, "up_proj", "down_proj"), off=(_rotated(1.0),)
    ),
    "persimmon": Architecture({**_SHAPE, **_rotated(0.5)}, _NEOX, off=(_rotated(1.0),)),
    "cohere": Architecture(
        {**_GROUPED, "use_qk_norm": True, "logit_scale": 0.25}, _LLAMA, off=({"logit_scale": 1.0},)
    ),
    "olmoe": Architecture(
        {**_GROUPED, "clip_qkv": 1.0, **_experts("num_experts")}, _ATTENTION, off=({"clip_qkv": None},)
    ),
    "stablelm": Architecture(
        {
            **_GROUPED,
            **_rotated(0.5),
            "use_qkv_bias": True,
            "qk_layernorm": True,
            "use_parallel_residual": True,
        },
        _LLAMA,
        off=(_rotated(1.0),),
    ),
    "biogpt": Architecture(_SHAPE, _FAIRSEQ),
    # Keys of 24 numbers, values of 20; the names of an expert's parts are those of the first layer's modules too.
    "deepseek_v3": Architecture(
        {
            **_SHAPE,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 20,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 2,
            **_experts("n_routed_experts", moe_intermediate_size=32),
        },
        ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        off=({"rope_interleave": False}, {"routed_scaling_factor": 1.0}),
        untargeted=_GATED,
        has_prefixes=False,
    ),
}
