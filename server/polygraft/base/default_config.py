"""The default model's configuration: with it, checking an adapter needs no download of 270 MB."""

from __future__ import annotations

from transformers import LlamaConfig

from polygraft.base.default_model import HUB_ID


def default_config() -> LlamaConfig:
    """Return the part of the default model's configuration that determines shapes and types.

    It equals what `convert` writes into the model's folder. The GGUF's hash is checked, so the two can't
    differ unnoticed.
    """
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        hidden_act="silu",
        max_position_embeddings=8192,
        rms_norm_eps=9.999999747378752e-06,
        rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    config.name_or_path = HUB_ID
    return config
