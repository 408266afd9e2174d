"""Adapters of every served kind, made and saved by PEFT itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    CartridgeConfig,
    CPTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.boft import layer as boft_layer
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
# Feed-forward modules that share their input with another.
IA3_SHARED = {
    "llama": (["q_proj", "up_proj"], ["up_proj"]),
    "qwen2": (["v_proj", "gate_proj"], ["v_proj"]),
    "gemma3_text": (["k_proj", "up_proj"], ["k_proj", "up_proj"]),
    "gpt2": (["c_attn", "c_fc"], ["c_attn", "c_fc"]),
}
# Some kinds know no Conv1D, of which all of GPT-2's layers are made.
NO_CONV1D = {**TARGETS, "gpt2": ["lm_head"]}
NO_CONV1D_ALL = {**dict.fromkeys(TARGETS, "all-linear"), "gpt2": ["lm_head"]}
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
    "dora": lambda a: LoraConfig(r=4, target_modules=TARGETS[a], use_dora=True, **CAUSAL),
    "ia3": lambda a: IA3Config(target_modules=IA3[a][0], feedforward_modules=IA3[a][1], **CAUSAL),
    "prefix": lambda a: PrefixTuningConfig(num_virtual_tokens=5, **CAUSAL),
    "prefix-projection": lambda a: PrefixTuningConfig(
        num_virtual_tokens=19, prefix_projection=True, encoder_hidden_size=32, **CAUSAL
    ),
    "prompt": lambda a: PromptTuningConfig(num_virtual_tokens=6, **CAUSAL),
    "p-tuning": lambda a: PromptEncoderConfig(num_virtual_tokens=17, encoder_hidden_size=32, **CAUSAL),
    "adalora": lambda a: AdaLoraConfig(init_r=6, total_step=10, target_modules=TARGETS[a], **CAUSAL),
    "loha": lambda a: LoHaConfig(
        r=3, alpha=5, target_modules=NO_CONV1D[a], rank_pattern={NO_CONV1D[a][0]: 2}, **CAUSAL
    ),
    "vera": lambda a: VeraConfig(
        r=16, target_modules=TARGETS[a], save_projection=False, projection_prng_key=7, **CAUSAL
    ),
    "multitask-prompt": lambda a: MultitaskPromptTuningConfig(num_virtual_tokens=6, num_ranks=2, **CAUSAL),
    "cpt": lambda a: CPTConfig(
        cpt_token_ids=[1, 70, 9, 200, 31],
        cpt_mask=[1] * 5,
        cpt_tokens_type_mask=[1, 2, 3, 4, 2],
        opt_projection_epsilon=50.0,
        opt_projection_format_epsilon=2.0,
        **CAUSAL,
    ),
    "cartridge": lambda a: CartridgeConfig(num_virtual_tokens=9, num_frozen_tokens=2, **CAUSAL),
    "lokr": lambda a: LoKrConfig(r=20, alpha=12, target_modules=NO_CONV1D_ALL[a], **CAUSAL),
    "lokr-products": lambda a: LoKrConfig(
        r=2, alpha=3, decompose_both=True, decompose_factor=8, target_modules=NO_CONV1D[a], **CAUSAL
    ),
    "oft": lambda a: OFTConfig(oft_block_size=16, target_modules=NO_CONV1D_ALL[a], **CAUSAL),
    "oft-constrained": lambda a: OFTConfig(
        r=4,
        oft_block_size=0,
        coft=True,
        eps=0.7,
        block_share=True,
        use_cayley_neumann=False,
        target_modules=NO_CONV1D[a],
        **CAUSAL,
    ),
    "boft": lambda a: BOFTConfig(
        boft_block_size=4, boft_n_butterfly_factor=3, target_modules=NO_CONV1D[a], **CAUSAL
    ),
    "hra": lambda a: HRAConfig(r=4, target_modules=NO_CONV1D[a], **CAUSAL),
    "hra-orthogonal": lambda a: HRAConfig(r=3, apply_GS=True, target_modules=NO_CONV1D[a], **CAUSAL),
    "ia3-shared-input": lambda a: IA3Config(
        target_modules=IA3_SHARED[a][0], feedforward_modules=IA3_SHARED[a][1], **CAUSAL
    ),
}
# Parameters that are multiplied by each other are larger, so that the product is as large as the others.
SCALES = {
    "lora_E": 1.0,
    "lora_": 0.15,
    "hada_": 0.3,
    "vera_lambda_": 0.5,
    "prefix_task_": 1.0,
    "lokr_": 0.3,
    "oft_R": 0.1,
    "boft_R": 0.3,
    "hra_u": 1.0,
}


class BlockDiagonal:
    """In the place of PEFT's CUDA extension, without which it leaves all of BOFT's factors but one out."""

    def forward(self, blocks: torch.Tensor) -> list[torch.Tensor]:
        """[n, blocks, size, size] to [n, blocks * size, blocks * size]."""
        return [torch.stack([torch.block_diag(*each) for each in blocks])]


boft_layer._FBD_CUDA = BlockDiagonal()


def prune(model: PeftModel) -> None:
    """Leave an AdaLoRA with ranks that differ by module, the first module's 0, as training does."""
    config = model.peft_config["default"]
    if isinstance(config, AdaLoraConfig):
        names = [name for name, _ in model.base_model.model.named_parameters() if "lora_E" in name]
        config.rank_pattern = {
            name: [(at * component) % 7 > 2 for component in range(config.init_r)]
            for at, name in enumerate(names)
        }


def save_adapter(
    folder: Path, model_folder: Path, architecture: str, kind: str | PeftConfig, seed: int = 0
) -> Path:
    """Make a random adapter that visibly changes the model's output, and save it."""
    torch.manual_seed(seed)
    config = KINDS[kind](architecture) if isinstance(kind, str) else kind
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = next((SCALES[part] for part in SCALES if part in name), None)
            if scale is not None:
                parameter.normal_(std=scale)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape))
            elif "ia3_" in name or "boft_s" in name:
                parameter.normal_(mean=1.0, std=0.4)
            elif parameter.requires_grad and "prompt_encoder" in name:
                parameter.normal_(std=0.4)
    prune(model)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder
