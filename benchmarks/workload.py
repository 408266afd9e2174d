"""Workload W, one definition for every side: 16 concurrent requests over 8 LoRA adapters, 2 each.

Prompts of 64 tokens, exactly 64 new tokens each, greedy, end of sequence ignored; adapters of rank 8 on q, k,
v, o, gate, up and down, with random weights (`lora_B` of standard deviation 0.02).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from polygraft.base.loader import DEFAULT_NAME
from polygraft.base.spec import BaseSpec

REQUESTS = 16
ADAPTERS = 8
PROMPT_TOKENS = 64
NEW_TOKENS = 64
RANK = 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapter_names() -> list[str]:
    """Names of the adapters."""
    return [f"random-{n}" for n in range(ADAPTERS)]


def requests() -> list[tuple[list[int], str]]:
    """(token ids, adapter name) of each request."""
    generator = torch.Generator().manual_seed(0)
    names = adapter_names()
    return [
        (torch.randint(1000, 40_000, (PROMPT_TOKENS,), generator=generator).tolist(), names[n % ADAPTERS])
        for n in range(REQUESTS)
    ]


def write_adapters(store: Path, base: BaseSpec, count: int = ADAPTERS, rank: int = RANK) -> None:
    """Write PEFT folders of random LoRA adapters in float32, as PEFT saves them for a bfloat16 base."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": DEFAULT_NAME,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": TARGETS,
    }
    for n in range(count):
        generator = torch.Generator().manual_seed(n)
        tensors = {}
        for module, shape in base.linears.items():
            if module.rsplit(".", 1)[-1] in TARGETS:
                a = torch.randn(rank, shape.in_features, generator=generator) * shape.in_features**-0.5
                b = torch.randn(shape.out_features, rank, generator=generator) * 0.02
                tensors[f"base_model.model.{module}.lora_A.weight"] = a
                tensors[f"base_model.model.{module}.lora_B.weight"] = b
        folder = store / f"random-{n}"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
