"""Random adapters of each kind for the default model, of comparable size: rank 8, 16 virtual tokens,
reduction factor 16. PEFT makes and saves its kinds; AdapterHub's, whose library needs another transformers,
are written in its format. Kinds with a rank are on q, k, v, o, gate, up and down, as in workload W.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    GraloraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from benchmarks.workload import RANK, TARGETS
from polygraft.base.default_model import HUB_ID
from polygraft.base.model_folder import resolve_model
from polygraft.core.spec import BaseSpec

TOKENS = 16
CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
LOW_RANK: dict[str, Any] = {"r": RANK, "target_modules": TARGETS, **CAUSAL}

PEFT_KINDS: Mapping[str, Callable[[], PeftConfig]] = {
    "LoRA": lambda: LoraConfig(**LOW_RANK),
    "DoRA": lambda: LoraConfig(use_dora=True, **LOW_RANK),
    "AdaLoRA": lambda: AdaLoraConfig(init_r=RANK, total_step=10, target_modules=TARGETS, **CAUSAL),
    "LoHa (rank 64)": lambda: LoHaConfig(**LOW_RANK),
    "LoKr": lambda: LoKrConfig(**LOW_RANK),
    "VeRA (rank 256)": lambda: VeraConfig(r=256, target_modules=["q_proj", "v_proj"], **CAUSAL),
    "OFT (blocks of 32)": lambda: OFTConfig(r=0, oft_block_size=32, target_modules=TARGETS, **CAUSAL),
    "IA3": lambda: IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **CAUSAL
    ),
    "HRA": lambda: HRAConfig(**LOW_RANK),
    "GraLoRA (rank 16)": lambda: GraloraConfig(gralora_k=2, **LOW_RANK),
    "LN tuning": lambda: LNTuningConfig(
        target_modules=["input_layernorm", "post_attention_layernorm", "norm"], **CAUSAL
    ),
    "trainable tokens (16)": lambda: TrainableTokensConfig(
        token_indices=list(range(TOKENS)), target_modules=["embed_tokens"], **CAUSAL
    ),
    "prefix tuning": lambda: PrefixTuningConfig(num_virtual_tokens=TOKENS, **CAUSAL),
    "prompt tuning": lambda: PromptTuningConfig(num_virtual_tokens=TOKENS, **CAUSAL),
    "P-tuning": lambda: PromptEncoderConfig(num_virtual_tokens=TOKENS, encoder_hidden_size=64, **CAUSAL),
}
BOTTLENECKS: Mapping[str, dict[str, Any]] = {
    "bottleneck, seq_bn": {"mh_adapter": False, "output_adapter": True},
    "bottleneck, double_seq_bn": {"mh_adapter": True, "output_adapter": True, "original_ln_before": False},
    "bottleneck, par_bn": {
        "mh_adapter": False, "output_adapter": True, "is_parallel": True, "original_ln_before": False,
        "scaling": 4.0, "reduction_factor": 2,
    },
}  # fmt: skip


def write_kinds(store: Path, base: BaseSpec, only: Collection[str] | None = None) -> dict[str, str]:
    """Write one adapter of each kind, or of those named, into the store; returns the folders by kind.

    Raises:
        ValueError: a name isn't one of the kinds.
    """
    known = [*PEFT_KINDS, *BOTTLENECKS]
    if unknown := set(only or ()) - set(known):
        raise ValueError(f"unknown kinds {sorted(unknown)}; there are {known}")
    names = {kind: f"kind-{at}" for at, kind in enumerate(known) if only is None or kind in only}
    for kind, name in names.items():
        if kind in PEFT_KINDS:
            _save(store / name, PEFT_KINDS[kind]())
        else:
            _write_bottleneck(store / name, base, BOTTLENECKS[kind])
    return names


def _save(folder: Path, config: PeftConfig) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(resolve_model("default"), dtype=torch.float32)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            # What starts as zeros, as ones or as the base's own would be dropped or change nothing.
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    config.base_model_name_or_path = HUB_ID
    model.save_pretrained(folder, save_embedding_layers=False)


def _write_bottleneck(folder: Path, base: BaseSpec, options: dict[str, Any]) -> None:
    """As `adapters` 1.3.0 saves one, its configuration's defaults those of seq_bn."""
    config = {
        "mh_adapter": False, "output_adapter": True, "reduction_factor": 16, "non_linearity": "relu",
        "original_ln_before": True, "original_ln_after": True, "ln_before": False, "ln_after": False,
        "is_parallel": False, "residual_before_ln": True, "adapter_residual_before_ln": False, "scaling": 1.0,
        "use_gating": False, "inv_adapter": None, "leave_out": [], "phm_layer": False, **options,
    }  # fmt: skip
    hidden = base.hidden_size
    width = int(hidden // config["reduction_factor"])
    places = [p for p in ("mh", "output") if config[f"{p}_adapter"]]
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in dict.fromkeys(site.layer for site in base.residual.values()):
        for place in places:
            site = f"{layer}.{'attention' if place == 'mh' else 'output'}_adapters.adapters.random"
            for part, shape in (("adapter_down.0", (width, hidden)), ("adapter_up", (hidden, width))):
                tensors[f"{site}.{part}.weight"] = torch.randn(*shape, generator=generator) * 0.02
                tensors[f"{site}.{part}.bias"] = torch.zeros(shape[0])
    folder.mkdir(parents=True)
    about = {
        "config": config, "hidden_size": hidden, "model_class": "LlamaForCausalLM", "model_type": "llama",
        "model_name": base.name, "name": "random", "version": "adapters.1.3.0",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(about))
    save_file(tensors, folder / "adapter.safetensors", metadata={"format": "pt"})
