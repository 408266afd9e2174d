"""Tiny random models of several architectures, with a byte tokenizer, built from a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

_LLAMA_LIKE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
VOCABULARY = 288
EOS = 256
CONFIGS = {
    "llama": {**_LLAMA_LIKE, "tie_word_embeddings": True},
    "qwen2": _LLAMA_LIKE,
    # Windows of 24 keys, so that prompts and prefixes of the tests are shorter and contexts longer.
    "gemma3_text": {**_LLAMA_LIKE, "head_dim": 16, "sliding_window": 24, "num_hidden_layers": 4,
                    "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256},
}  # fmt: skip
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, so that any text goes in and characters come out in pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    assert fast.eos_token_id == EOS
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny_model(folder: Path, architecture: str, seed: int = 0, **overrides: object) -> Path:
    """Write a random model and its tokenizer; weights are large enough for attention to matter."""
    return save_random_model(folder, architecture, {**CONFIGS[architecture], **overrides}, seed)


def save_random_model(
    folder: Path, architecture: str, settings: Mapping[str, object], seed: int = 0, *, vectors: bool = False
) -> Path:
    """The same of any architecture.

    Args:
        vectors: change norms' weights and attention sinks too, which a new model has alike.
    """
    config = AutoConfig.for_model(
        architecture,
        **settings,
        vocab_size=VOCABULARY,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=257,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15 if "embed" in name or "wte" in name or "wpe" in name else 0.12)
            elif "bias" in name:
                parameter.normal_(std=0.1)
            elif "sinks" in name:
                parameter.normal_(mean=1.0)
            elif vectors:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
