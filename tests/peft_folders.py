"""Adapters of every served kind, made and saved by PEFT itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peft import (
    AdaLoraConfig,
    BeftConfig,
    BOFTConfig,
    C3AConfig,
    CartridgeConfig,
    CPTConfig,
    DeftConfig,
    DeloraConfig,
    FourierFTConfig,
    FrodConfig,
    GloraConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    MultitaskPromptTuningConfig,
    OFTConfig,
    OSFConfig,
    PeanutConfig,
    PeftConfig,
    PeftModel,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PveraConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    SupertuningConfig,
    TinyLoraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
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
EMBEDDING = {"llama": "embed_tokens", "qwen2": "embed_tokens", "gemma3_text": "embed_tokens", "gpt2": "wte"}
# By the ends of their names, so that "norm" is all of a Llama's.
NORMS = {"llama": "norm", "qwen2": "norm", "gemma3_text": "norm", "gpt2": "ln_f"}
LN_TARGETS = {
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "qwen2": ["post_attention_layernorm"],
    "gemma3_text": ["input_layernorm", "pre_feedforward_layernorm", "q_norm", "norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
}
SOME_TOKENS = list(range(2, 250, 3))
OTHER_TOKENS = list(range(248, 0, -5))
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
    "lora-embedding": lambda a: LoraConfig(r=4, target_modules=[*TARGETS[a], EMBEDDING[a]], **CAUSAL),
    # PEFT forgets a GPT-2's head when it loads what it has tied and saved.
    "lora-embedding-head": lambda a: LoraConfig(
        r=4,
        target_modules=[*TARGETS[a], EMBEDDING[a], "lm_head"],
        ensure_weight_tying=a != "gpt2",
        **CAUSAL,
    ),
    "lora-tokens": lambda a: LoraConfig(
        r=4, target_modules=TARGETS[a], trainable_token_indices=SOME_TOKENS, **CAUSAL
    ),
    "lora-tokens-head": lambda a: LoraConfig(
        r=4,
        target_modules=TARGETS[a],
        trainable_token_indices={EMBEDDING[a]: OTHER_TOKENS, "lm_head": SOME_TOKENS},
        **CAUSAL,
    ),
    "lora-saved-head": lambda a: LoraConfig(
        r=4, target_modules=TARGETS[a], modules_to_save=["lm_head"], **CAUSAL
    ),
    "lora-saved-tokens": lambda a: LoraConfig(
        r=4, target_modules=TARGETS[a], modules_to_save=[EMBEDDING[a], "lm_head"], **CAUSAL
    ),
    "lora-saved-norms": lambda a: LoraConfig(
        r=4, target_modules=TARGETS[a], modules_to_save=[NORMS[a]], **CAUSAL
    ),
    "lora-all-biases": lambda a: LoraConfig(r=4, target_modules=TARGETS[a], bias="all", **CAUSAL),
    "dora-biases": lambda a: LoraConfig(
        r=4, target_modules=TARGETS[a], bias="lora_only", use_dora=True, **CAUSAL
    ),
    "trainable-tokens": lambda a: TrainableTokensConfig(token_indices=SOME_TOKENS, **CAUSAL),
    "ln-tuning": lambda a: LNTuningConfig(target_modules=LN_TARGETS[a], **CAUSAL),
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
    "pvera": lambda a: PveraConfig(r=16, target_modules=TARGETS[a], bias="pvera_only", **CAUSAL),
    "delora": lambda a: DeloraConfig(
        r=4, target_modules=NO_CONV1D[a], rank_pattern={NO_CONV1D[a][0]: 3}, bias="all", **CAUSAL
    ),
    "gralora": lambda a: GraloraConfig(r=6, gralora_k=2, alpha=9, target_modules=TARGETS[a], **CAUSAL),
    "gralora-hybrid": lambda a: GraloraConfig(
        r=4, gralora_k=4, hybrid_r=3, alpha=9, target_modules=TARGETS[a], bias="gralora_only", **CAUSAL
    ),
    "miss": lambda a: MissConfig(r=6, target_modules=NO_CONV1D[a], **CAUSAL),
    "miss-mini": lambda a: MissConfig(
        r=4, init_weights="mini", mini_r=8, target_modules=NO_CONV1D[a], bias="all", **CAUSAL
    ),
    "unilora": lambda a: UniLoraConfig(r=4, theta_d_length=99, target_modules=TARGETS[a], **CAUSAL),
    "unilora-indices": lambda a: UniLoraConfig(
        r=3, theta_d_length=50, save_indices=True, target_modules=TARGETS[a], bias="unilora_only", **CAUSAL
    ),
    "vblora": lambda a: VBLoRAConfig(
        r=4, num_vectors=20, vector_length=16, target_modules=TARGETS[a], **CAUSAL
    ),
    "vblora-topk": lambda a: VBLoRAConfig(
        r=3,
        num_vectors=300,
        vector_length=32,
        topk=3,
        save_only_topk_weights=True,
        target_modules=TARGETS[a],
        bias="all",
        **CAUSAL,
    ),
    "tinylora": lambda a: TinyLoraConfig(r=3, u=8, weight_tying=0.6, target_modules=TARGETS[a], **CAUSAL),
    "tinylora-seed": lambda a: TinyLoraConfig(
        r=2,
        u=5,
        save_projection=False,
        projection_seed=3,
        target_modules=TARGETS[a],
        bias="tinylora_only",
        **CAUSAL,
    ),
    "beft": lambda a: BeftConfig(target_modules=NO_CONV1D[a], **CAUSAL),
    "fourierft": lambda a: FourierFTConfig(
        n_frequency=70,
        scaling=60.0,
        n_frequency_pattern={TARGETS[a][0]: 30},
        target_modules=TARGETS[a],
        bias="fourierft_only",
        **CAUSAL,
    ),
    "c3a": lambda a: C3AConfig(
        block_size=32,
        block_size_pattern={NO_CONV1D[a][0]: 16},
        target_modules=NO_CONV1D[a],
        bias="c3a_only",
        **CAUSAL,
    ),
    "shira": lambda a: ShiraConfig(r=3, random_seed=1, target_modules=NO_CONV1D[a], **CAUSAL),
    "hira": lambda a: HiraConfig(r=4, target_modules=TARGETS[a], **CAUSAL),
    "miss-bat": lambda a: MissConfig(
        r=8, init_weights="bat", target_modules=NO_CONV1D[a], bias="MiSS_only", **CAUSAL
    ),
    "waveft": lambda a: WaveFTConfig(
        n_frequency=90, scaling=4.0, target_modules=TARGETS[a], bias="waveft_only", **CAUSAL
    ),
    "randlora": lambda a: RandLoraConfig(
        r=10, randlora_alpha=20, target_modules=TARGETS[a], bias="randlora_only", **CAUSAL
    ),
    "supertuning": lambda a: SupertuningConfig(sparsity=0.9, target_modules=NO_CONV1D[a], **CAUSAL),
    "supra": lambda a: SupertuningConfig(
        sparsity=0.95, r=3, lora_alpha=5, target_modules=NO_CONV1D[a], **CAUSAL
    ),
    "road": lambda a: RoadConfig(group_size=16, target_modules=NO_CONV1D[a], **CAUSAL),
    "road-4": lambda a: RoadConfig(variant="road_4", group_size=32, target_modules=NO_CONV1D[a], **CAUSAL),
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
    "oft-biases": lambda a: OFTConfig(oft_block_size=8, bias="all", target_modules=NO_CONV1D[a], **CAUSAL),
    "boft-biases": lambda a: BOFTConfig(
        boft_block_size=8, bias="boft_only", target_modules=NO_CONV1D[a], **CAUSAL
    ),
    "hra-biases": lambda a: HRAConfig(r=2, bias="all", target_modules=NO_CONV1D[a], **CAUSAL),
    "hra-orthogonal": lambda a: HRAConfig(r=3, apply_GS=True, target_modules=NO_CONV1D[a], **CAUSAL),
    "deft": lambda a: DeftConfig(r=4, alpha=6, target_modules=TARGETS[a], **CAUSAL),
    "deft-qr": lambda a: DeftConfig(
        r=5, decomposition_method="qr", bias="deft_only", target_modules=TARGETS[a], **CAUSAL
    ),
    "deft-para": lambda a: DeftConfig(r=3, para=True, bias="all", target_modules=TARGETS[a], **CAUSAL),
    "peanut": lambda a: PeanutConfig(r=6, scaling=0.7, target_modules=NO_CONV1D[a], **CAUSAL),
    "peanut-deep": lambda a: PeanutConfig(
        r=5, depth=2, act_fn="gelu_new", target_modules=NO_CONV1D[a], **CAUSAL
    ),
    "glora": lambda a: GloraConfig(r=3, bias="glora_only", target_modules=NO_CONV1D[a], **CAUSAL),
    "glora-vector": lambda a: GloraConfig(
        r=3,
        config_A_B="vector",
        config_D_E="vector",
        bias="glora_only",
        target_modules=NO_CONV1D[a],
        **CAUSAL,
    ),
    "glora-constant": lambda a: GloraConfig(
        config_A_B="constant", config_C="vector", config_D_E="none", target_modules=NO_CONV1D_ALL[a], **CAUSAL
    ),
    "poly": lambda a: PolyConfig(r=4, n_skills=3, target_modules=NO_CONV1D[a], **CAUSAL),
    "poly-heads": lambda a: PolyConfig(r=3, n_skills=2, n_splits=4, target_modules=NO_CONV1D[a], **CAUSAL),
    "osf": lambda a: OSFConfig(target_modules=NO_CONV1D[a], **CAUSAL),
    "osf-few": lambda a: OSFConfig(
        effective_rank=0.9, rank_pattern={NO_CONV1D[a][0]: 61}, target_modules=NO_CONV1D[a], **CAUSAL
    ),
    "frod": lambda a: FrodConfig(
        sparse_rate=0.05, progressbar=False, bias="frod_only", target_modules=TARGETS[a], **CAUSAL
    ),
    "ia3-shared-input": lambda a: IA3Config(
        target_modules=IA3_SHARED[a][0], feedforward_modules=IA3_SHARED[a][1], **CAUSAL
    ),
}
MERGED_ONLY = (
    "fourierft",
    "c3a",
    "shira",
    "hira",
    "miss-bat",
    "waveft",
    "randlora",
    "road",
    "road-4",
    "supertuning",
    "supra",
    "glora",
    "osf",
    "frod",
)
"""Kinds that are served on merged copies alone."""
COMMON = (
    "lora", "lora-all-linear", "rslora-patterns", "lora-bias", "lora-regex", "lora-layers", "lora-head",
    "lora-tokens", "lora-saved-norms", "dora", "ia3", "prefix", "prefix-projection", "prompt", "p-tuning", "adalora",
    "loha", "lokr", "oft", "boft", "hra", "hra-orthogonal", "ia3-shared-input", "vera", "multitask-prompt", "cpt", "cartridge",
)  # fmt: skip
"""At least one for each primitive that a step runs: for tests that need adapters, but not every kind."""
# Parameters that are multiplied by each other are larger, so that the product is as large as the others; one that is
# added to every element is smaller, or PEFT's own sums would lose the base's product in it. The first that is a part of
# a name counts, so what holds another stands before it.
SCALES = {
    "glora_B": 0.03, "glora_": 0.25, "poly_lora": 0.5, "poly_router": 2.0,
    "lora_E": 1.0, "delora_lambda": 8.0, "unilora_": 0.6, "vblora_logits": 1.0, "vblora_vector": 0.3, "tinylora_": 1.0,
    "waveft_": 0.2, "randlora_lambda": 0.3, "randlora_gamma": 0.05, "road_theta": 0.4,
    "fourierft_": 1.0, "c3a_": 3.0, "shira_": 0.3, "supertuning_values": 0.3, "hira_": 0.5,
    "lora_": 0.15, "hada_": 0.3, "vera_lambda_": 0.5, "miss_block": 0.1, "beft_": 0.4, "prefix_task_": 1.0,
    "lokr_": 0.3, "oft_R": 0.1, "boft_R": 0.3, "hra_u": 1.0,
    "deft_P": 0.2, "deft_R": 0.3, "peanut_": 0.4, "osf_svd": 0.25, "frod_lambda_s": 0.2,
}  # fmt: skip


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
            elif "ia3_" in name or "boft_s" in name or "road_alpha" in name:
                parameter.normal_(mean=1.0, std=0.4)
            elif (parameter.requires_grad and "prompt_encoder" in name) or "beft_" in name:
                parameter.normal_(std=0.4)
            elif parameter.requires_grad:
                # What is replaced: tokens, norms, biases, whole modules.
                parameter.add_(torch.randn(parameter.shape), alpha=0.15)
    prune(model)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder
