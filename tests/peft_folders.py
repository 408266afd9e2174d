"""Adapters of every served kind, made and saved by PEFT itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

# The last name of a module: attention input, attention value or its like, MLP.
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
    "gemma3_text": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
}
REGEX = {
    "llama": r".*layers\.\d+\.(self_attn\.k_proj|mlp\.up_proj)",
    "qwen2": r".*layers\.\d+\.(self_attn\.k_proj|mlp\.up_proj)",
    "gemma3_text": r".*layers\.\d+\.(self_attn\.k_proj|mlp\.up_proj)",
    "gpt2": r".*h\.\d+\.(attn\.c_proj|mlp\.c_proj)",
}
# Output-scaled modules and, with the scale on their input, feed-forward ones.
IA3 = {
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "qwen2": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gemma3_text": (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
}
CAUSAL = {"task_type": "CAUSAL_LM"}

KINDS: dict[str, Callable[[str], PeftConfig]] = {
    "lora": lambda a: LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[a], **CAUSAL),
    "lora-all-linear": lambda a: LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", **CAUSAL),
    "rslora-patterns": lambda a: LoraConfig(
        r=4,
        lora_alpha=4,
        use_rslora=True,
        target_modules=TARGETS[a],
        rank_pattern={TARGETS[a][0]: 2, r"1\..*" + TARGETS[a][-1]: 7},
        alpha_pattern={TARGETS[a][-1]: 9},
        **CAUSAL,
    ),
    "lora-bias": lambda a: LoraConfig(r=4, target_modules=TARGETS[a], lora_bias=True, **CAUSAL),
    "lora-regex": lambda a: LoraConfig(r=5, target_modules=REGEX[a], **CAUSAL),
    "lora-layers": lambda a: LoraConfig(r=4, target_modules=TARGETS[a], layers_to_transform=[0, 2], **CAUSAL),
    "lora-head": lambda a: LoraConfig(r=4, target_modules=[*TARGETS[a], "lm_head"], **CAUSAL),
    "ia3": lambda a: IA3Config(target_modules=IA3[a][0], feedforward_modules=IA3[a][1], **CAUSAL),
    "prefix": lambda a: PrefixTuningConfig(num_virtual_tokens=5, **CAUSAL),
    "prefix-projection": lambda a: PrefixTuningConfig(
        num_virtual_tokens=19, prefix_projection=True, encoder_hidden_size=32, **CAUSAL
    ),
    "prompt": lambda a: PromptTuningConfig(num_virtual_tokens=6, **CAUSAL),
    "p-tuning": lambda a: PromptEncoderConfig(num_virtual_tokens=17, encoder_hidden_size=32, **CAUSAL),
}


def save_adapter(folder: Path, model_folder: Path, architecture: str, kind: str, seed: int = 0) -> Path:
    """Make a random adapter that visibly changes the model's output, and save it."""
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32), KINDS[kind](architecture)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.15)
            elif "ia3_" in name:
                parameter.normal_(mean=1.0, std=0.4)
            elif parameter.requires_grad and "prompt_encoder" in name:
                parameter.normal_(std=0.4)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder
