"""An adapter lands on the same modules here as in PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from transformers import AutoModelForCausalLM

from polygraft.adapters.files.folder import AdapterFolder, Weights
from polygraft.adapters.files.patterns import Form, KeyPatterns, Matching
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.peft.targets import target_modules
from polygraft.core.spec import BaseSpec

LLAMA: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]},
    {"target_modules": ["model.layers.1.self_attn.o_proj"]},
    {"target_modules": ["1.self_attn.o_proj", "lm_head"]},
    {"target_modules": "all-linear"},
    {"target_modules": "ALL-linear"},
    {"target_modules": "all-linear", "exclude_modules": ["gate_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*layers\.[01]\..*"},
    {"target_modules": r".*\.(q|k)_proj"},
    {"target_modules": r"model\.layers\.[02]\.mlp\.up_proj"},
    {"target_modules": r".*\.q_proj|lm_head", "exclude_modules": ["model.layers.1.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
    {"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"},
    {"target_modules": ["q_proj"], "exclude_modules": ["0.self_attn.q_proj"]},
    {"target_modules": ["q_proj"], "layers_to_transform": 0},
    {"target_modules": ["q_proj"], "layers_to_transform": 2},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": []},
    {"target_modules": ["model.layers.0.self_attn.q_proj", "up_proj"], "layers_to_transform": [2]},
]
GPT2: list[dict[str, Any]] = [
    {"target_modules": ["c_attn"]},
    {"target_modules": ["c_proj"]},
    {"target_modules": ["attn.c_proj"]},
    {"target_modules": "all-linear"},
    {"target_modules": ["c_fc"], "layers_to_transform": [0, 1], "layers_pattern": "h"},
    {"target_modules": r"transformer\.h\.\d\.mlp\.c_(fc|proj)"},
]
TABLE = [("llama", options) for options in LLAMA] + [("gpt2", options) for options in GPT2]


@pytest.mark.parametrize(("architecture", "options"), TABLE, ids=[f"{a}-{o}" for a, o in TABLE])
def test_the_same_modules_as_peft(
    tiny_model: Callable[[str], Path],
    specs: Callable[[str], BaseSpec],
    architecture: str,
    options: dict[str, Any],
) -> None:
    bare = AutoModelForCausalLM.from_pretrained(tiny_model(architecture))
    model = get_peft_model(bare, LoraConfig(task_type="CAUSAL_LM", **options))
    wrapped = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    reader = FolderReader(AdapterFolder("a", options, Weights(EMPTY), ""), None, max_rank=8, max_bytes=0)
    found = target_modules(reader, specs(architecture))
    assert sorted(found) == sorted(wrapped)
    assert reader.problems == []


EMPTY = (2).to_bytes(8, "little") + b"{}"

PATTERNS = [
    "q_proj",
    "layers.1.self_attn.v_proj",
    r"1\..*down_proj",
    "self_attn.*",
    "up_proj|gate_proj",
    "proj",
]


@pytest.mark.parametrize("patterns", [PATTERNS, PATTERNS[::-1], []], ids=["forwards", "backwards", "none"])
def test_patterns_pick_the_same_key_as_peft(spec: BaseSpec, patterns: list[str]) -> None:
    for module in spec.linears:
        key = get_pattern_key(patterns, module)
        assert KeyPatterns(patterns, Form.KEY, Matching()).first(module) == (key if key in patterns else None)
