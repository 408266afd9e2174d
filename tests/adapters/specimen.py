"""Adapter folders to damage."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from polygraft.adapters.compile import compile_adapter, run_to_end
from polygraft.adapters.files.folder import CONFIG, WEIGHTS
from polygraft.adapters.files.store import read_folder
from polygraft.adapters.limits import AdapterLimits
from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.spec import BaseSpec

DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "kinds.md"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@dataclass
class Specimen:
    """An adapter as its library saved it, to be changed and saved again."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    weights: str = WEIGHTS

    @classmethod
    def load(cls, folder: Path, weights: str = WEIGHTS) -> Specimen:
        return cls(json.loads((folder / CONFIG).read_text()), load_file(folder / weights), weights)

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.config))
        save_file(self.tensors, folder / self.weights)
        return folder


def split(folder: Path) -> None:
    """Make a folder for each task of one that holds several, by the document's code."""
    code = re.search(r"```python\n(config = json.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert code
    exec(code[1], {"json": json, "load_file": load_file, "save_file": save_file, "folder": folder})


def compile_folder(folder: Path, base: BaseSpec, limits: AdapterLimits | None = None) -> AdapterWeights:
    """All that loading does before the engine sees the adapter."""
    limits = limits or AdapterLimits()
    files = read_folder(folder.name, folder, limits.compiled_bytes)
    return run_to_end(compile_adapter(files, base, limits))
