"""Stores of random adapters for the experiments."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.adapter_files import write_adapters
from benchmarks.workload import adapter_names
from polygraft.base.default_model import HUB_ID
from polygraft.core.spec import BaseSpec

DISTINCT = 8
"""So many folders of a large store differ; the others are the same files under other names."""


def lora_store(store: Path, base: BaseSpec, count: int = 8, rank: int = 8) -> list[str]:
    """A store of LoRA adapters; returns their names."""
    write_adapters(store, base, min(count, DISTINCT), rank)
    names = adapter_names(count)
    for n, name in enumerate(names[DISTINCT:]):
        source = store / names[n % DISTINCT]
        (store / name).mkdir()
        for file in source.iterdir():
            os.link(file, store / name / file.name)
    return names


def rank_store(store: Path, base: BaseSpec, ranks: Iterable[int], each: int) -> dict[int, list[str]]:
    """Several adapters of each rank; returns their names by rank."""
    names: dict[int, list[str]] = {}
    for rank in ranks:
        aside = store.with_name(f"rank-{rank}")
        write_adapters(aside, base, each, rank)
        names[rank] = []
        for folder in sorted(aside.iterdir()):
            name = f"rank-{rank}-{folder.name}"
            store.mkdir(exist_ok=True)
            folder.rename(store / name)
            names[rank].append(name)
    return names


def prefix_store(store: Path, base: BaseSpec, lengths: Iterable[int]) -> dict[int, str]:
    """A prefix-tuning adapter of each number of virtual tokens; returns their names."""
    site = next(iter(base.attention.values()))
    layers = len(base.attention)
    names = {}
    for length in lengths:
        names[length] = f"prefix-{length}"
        folder = store / names[length]
        folder.mkdir(parents=True)
        config = {
            "peft_type": "PREFIX_TUNING",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": HUB_ID,
            "num_virtual_tokens": length,
            "num_layers": layers,
            "num_attention_heads": site.kv_heads,
            "token_dim": site.kv_heads * site.head_dim,
            "num_transformer_submodules": 1,
        }
        generator = torch.Generator().manual_seed(length)
        table = torch.randn(length, layers * 2 * site.kv_heads * site.head_dim, generator=generator)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(
            {"prompt_embeddings": table}, folder / "adapter_model.safetensors", metadata={"format": "pt"}
        )
    return names
