"""Bottleneck adapters in AdapterHub's format for any tiny model, beside PEFT's kinds in the equivalence matrix.

That the format and what it means are the library's own is what `test_golden.py` and `test_engine.py` show.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from polygraft.adapters.compile import compile_adapter, run_to_end
from polygraft.adapters.files.store import read_folder
from polygraft.adapters.limits import AdapterLimits
from polygraft.base.inspect.residual_sites import ATTENTION
from polygraft.base.loader import inspect_without_weights
from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.spec import BaseSpec

_DEFAULTS: dict[str, Any] = {
    "mh_adapter": False, "output_adapter": True, "cross_adapter": False, "reduction_factor": 8,
    "non_linearity": "relu", "original_ln_before": True, "original_ln_after": True, "ln_before": False,
    "ln_after": False, "is_parallel": False, "residual_before_ln": True, "adapter_residual_before_ln": False,
    "scaling": 1.0, "use_gating": False, "inv_adapter": None, "inv_adapter_reduction_factor": None,
    "leave_out": [], "phm_layer": False, "dropout": 0.0, "init_weights": "bert",
}  # fmt: skip
BOTTLENECKS: Mapping[str, dict[str, Any]] = {
    "bottleneck": {},
    "bottleneck-double": {"mh_adapter": True, "original_ln_before": False, "non_linearity": "swish"},
    "bottleneck-parallel": {
        "is_parallel": True, "original_ln_before": False, "scaling": 4.0, "reduction_factor": 2, "leave_out": [0],
    },
    "bottleneck-invertible": {"inv_adapter": "nice", "inv_adapter_reduction_factor": 4, "reduction_factor": 64},
}  # fmt: skip
WITHOUT = ("gemma3_text",)
"""Bases that bottlenecks aren't served on."""


def save_bottleneck(folder: Path, model: Path, kind: str, seed: int = 0) -> Path:
    """Write a random adapter that visibly changes the model's output."""
    base = inspect_without_weights(str(model))
    config = {**_DEFAULTS, **BOTTLENECKS[kind]}
    hidden = base.hidden_size
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def add(module: str, outputs: int, inputs: int) -> None:
        tensors[f"{module}.weight"] = torch.randn(outputs, inputs, generator=generator) * 0.15
        tensors[f"{module}.bias"] = torch.randn(outputs, generator=generator) * 0.1

    width = int(hidden // config["reduction_factor"])
    for site in base.residual.values():
        attention = site.first
        if int(site.layer.rpartition(".")[2]) in config["leave_out"]:
            continue
        if config["mh_adapter" if attention else "output_adapter"]:
            name = f"{site.layer}.{ATTENTION if attention else 'output'}_adapters.adapters.random"
            add(f"{name}.adapter_down.0", width, hidden)
            add(f"{name}.adapter_up", hidden, width)
    if config["inv_adapter"]:
        body = next(iter(base.residual.values())).layer.split(".")[0]
        inner = int(hidden // 2 // config["inv_adapter_reduction_factor"])
        for letter in "FG":
            add(f"{body}.invertible_adapters.random.{letter}.0", inner, hidden // 2)
            add(f"{body}.invertible_adapters.random.{letter}.2", hidden // 2, inner)
    folder.mkdir(parents=True)
    about = {
        "config": config, "hidden_size": hidden, "model_class": "LlamaAdapterModel", "model_name": "",
        "model_type": base.architecture, "name": "random", "version": "adapters.1.3.0",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(about))
    save_file(tensors, folder / "adapter.safetensors")
    return folder


def compiled_for(model: Path, folder: Path) -> tuple[BaseSpec, AdapterWeights]:
    """A base's names, and an adapter's primitives in float32."""
    base = inspect_without_weights(str(model))
    return base, run_to_end(compile_adapter(read_folder("a", folder, 2**30), base, AdapterLimits()))
