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
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
WINDOW = 8
"""Keys that a sliding layer sees, its own included."""
_MIXED_WINDOWS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_LLAMA = (*_ATTENTION, *_GATED)
_NEOX = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
_FAIRSEQ = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def _experts(count: str, **widths: int) -> dict[str, Any]:
    return {count: 4, "num_experts_per_tok": 2, **widths}


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Args:
        config: beside what every tiny model has.
        targets: all linear modules but the head, by their last names: what the tests' LoRA adapts.
        untargeted: those that PEFT can't adapt.
        prompt: what PEFT must be told for prompt tuning, since it guesses wrong.
    """

    config: Mapping[str, Any]
    targets: tuple[str, ...]
    untargeted: tuple[str, ...] = ()
    prompt: Mapping[str, Any] = field(default_factory=dict)


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [2.0, 3.0, 5.0, 9.0],
}
"""Four factors for the eight of sixteen dimensions that are rotated."""

MATRIX: dict[str, Architecture] = {
    "mistral": Architecture({**_GROUPED, "sliding_window": WINDOW}, _LLAMA),
    "mixtral": Architecture({**_GROUPED, "sliding_window": WINDOW, **_experts("num_local_experts")}, _ATTENTION),
    "qwen3": Architecture(
        {**_GROUPED, "head_dim": 32, "use_sliding_window": True, **_MIXED_WINDOWS}, _LLAMA
    ),
    # The second layer's feed-forward is a plain one. PEFT takes its modules' names for the experts' parts, which
    # they were before transformers 5, and adapts those parameters instead (peft/utils/
    # transformers_weight_conversion.py), so nothing can be made for it.
    "qwen3_moe": Architecture(
        {**_GROUPED, "head_dim": 16, "use_sliding_window": True, "sliding_window": WINDOW,
         "mlp_only_layers": [1], **_experts("num_experts", moe_intermediate_size=48)},
        _ATTENTION, untargeted=_GATED,
    ),
    "gemma2": Architecture(
        {**_GROUPED, "head_dim": 32, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 4.0, **_MIXED_WINDOWS}, _LLAMA
    ),
    "phi3": Architecture(
        {**_GROUPED, "sliding_window": 24, "rope_parameters": LONG_ROPE,
         "original_max_position_embeddings": 64}, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    ),
    "gpt_neox": Architecture({**_SHAPE, "rotary_pct": 0.5, "use_parallel_residual": True}, _NEOX),
    "opt": Architecture(
        {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 256, "word_embed_proj_dim": 32}, (*_FAIRSEQ, "project_in", "project_out"),
        prompt={"token_dim": 32},
    ),
    "starcoder2": Architecture({**_GROUPED, "sliding_window": WINDOW}, (*_ATTENTION, "c_fc", "c_proj")),
    "cohere2": Architecture({**_GROUPED, "logit_scale": 0.25, **_MIXED_WINDOWS}, _LLAMA),
    "olmo2": Architecture(_GROUPED, _LLAMA),
    "granite": Architecture(
        {**_GROUPED, "embedding_multiplier": 6.0, "residual_multiplier": 0.5, "attention_multiplier": 0.4,
         "logits_scaling": 2.0}, _LLAMA
    ),
    # The second layer has no rotary positions.
    "smollm3": Architecture({**_GROUPED, "no_rope_layers": [1, 0]}, _LLAMA),
    "gpt_oss": Architecture({**_GROUPED, "head_dim": 16, **_experts("num_local_experts"), **_MIXED_WINDOWS}, _ATTENTION),
    "glm4": Architecture(
        {**_GROUPED, "head_dim": 16, "partial_rotary_factor": 0.5, "attention_bias": True},
        (*_ATTENTION, "gate_up_proj", "down_proj"),
    ),
}  # fmt: skip

SMOKE: dict[str, Architecture] = {
    "qwen2_moe": Architecture(
        {**_GROUPED, "use_sliding_window": True,  **_MIXED_WINDOWS,
         **_experts("num_experts", moe_intermediate_size=48, shared_expert_intermediate_size=80)},
        (*_LLAMA, "shared_expert_gate"),
    ),
    "gemma": Architecture({**_GROUPED, "head_dim": 32}, _LLAMA),
    "phi": Architecture(
        {**_GROUPED, "partial_rotary_factor": 0.5, "qk_layernorm": True},
        ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    ),
    "gpt_bigcode": Architecture(_GPT2, ("c_attn", "c_proj", "c_fc")),
    "exaone4": Architecture({**_GROUPED, **_MIXED_WINDOWS}, _LLAMA),
    "ernie4_5": Architecture({**_GROUPED, "head_dim": 16, "use_bias": True}, _LLAMA),
    "helium": Architecture({**_GROUPED, "head_dim": 16}, _LLAMA),
    "nemotron": Architecture({**_GROUPED, "partial_rotary_factor": 0.5}, (*_ATTENTION, "up_proj", "down_proj")),
    "persimmon": Architecture({**_SHAPE, "partial_rotary_factor": 0.5}, _NEOX),
    "cohere": Architecture({**_GROUPED, "use_qk_norm": True, "logit_scale": 0.25}, _LLAMA),
    "olmoe": Architecture({**_GROUPED, "clip_qkv": 1.0, **_experts("num_experts")}, _ATTENTION),
    "stablelm": Architecture(
        {**_GROUPED, "partial_rotary_factor": 0.5, "use_qkv_bias": True, "qk_layernorm": True,
         "use_parallel_residual": True}, _LLAMA
    ),
    "biogpt": Architecture(_SHAPE, _FAIRSEQ),
}  # fmt: skip
