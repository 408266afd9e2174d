"""Writes workload W's adapters: random LoRA weights, `lora_B` of standard deviation 0.02."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.workload import ADAPTERS, RANK, TARGETS, adapter_names
from polygraft.base.default_model import HUB_ID
from polygraft.core.spec import BaseSpec


def write_adapters(store: Path, base: BaseSpec, count: int = ADAPTERS, rank: int = RANK) -> None:
    """Write PEFT folders of random LoRA adapters in float32, as PEFT saves them for a bfloat16 base."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": HUB_ID,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": TARGETS,
    }
    for n, name in enumerate(adapter_names(count)):
        generator = torch.Generator().manual_seed(n)
        tensors = {}
        for module, shape in base.linears.items():
            if module.rsplit(".", 1)[-1] in TARGETS:
                a = torch.randn(rank, shape.in_features, generator=generator) * shape.in_features**-0.5
                b = torch.randn(shape.out_features, rank, generator=generator) * 0.02
                tensors[f"base_model.model.{module}.lora_A.weight"] = a
                tensors[f"base_model.model.{module}.lora_B.weight"] = b
        folder = store / name
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
