"""A new kind is one file: it is found, described, checked, and served in mixed steps and on a merged copy."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from polygraft.adapters import compile as compiling
from polygraft.adapters import peft
from polygraft.adapters.kinds import find_kinds
from polygraft.config import ServerConfig
from polygraft.engine.check import check_folder
from tests.engines import forced_logits, make_engine, merged_logits
from tests.peft_folders import save_adapter
from tools.docs_tables import served

TOY = '''
"""Adds one column times the sum of a module's inputs."""

import torch

from polygraft.adapters.kind import side_path
from polygraft.adapters.peft.module_kind import ModuleKind


class Toy(ModuleKind):
    """One column for each module."""

    peft_type = "TOY"
    title = "toy"
    rows = (side_path("low-rank side path of rank 1", "rows"),)
    training_only = ("toy_seed",)

    def __init__(self, reader, base):
        super().__init__(reader, base)
        self._gain = reader.option("gain", (int, float), 1.0)

    def change(self, module):
        """Return the column, and ones to multiply it by."""
        column = module.take("toy_column", (module.outputs, 1))
        return module.low_rank(torch.ones(1, module.inputs), column, self._gain)
'''
TARGETS = ["q_proj", "down_proj"]
GAIN = 0.5
TOKENS = [5, 9, 2, 7, 11, 3]


@pytest.fixture
def with_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kind's file in the package, as if it lay there."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "toy.py").write_text(TOY)
    monkeypatch.setattr(peft, "__path__", [*peft.__path__, str(code)])
    monkeypatch.setattr(compiling, "KINDS", find_kinds())
    yield
    sys.modules.pop(f"{peft.__name__}.toy", None)


def save_toy(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """Save an adapter of the kind; returns each module's column."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    columns = {
        name: torch.randn(module.out_features, 1, generator=generator)
        for name, module in model.named_modules()
        if name.split(".")[-1] in TARGETS
    }
    folder.mkdir(parents=True)
    tensors = {f"base_model.model.{name}.toy_column": column for name, column in columns.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "TOY", "target_modules": TARGETS, "gain": GAIN, "toy_seed": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return columns


@pytest.mark.usefixtures("with_toy")
def test_it_is_served_mixed_and_merged(llama: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    columns = save_toy(store / "toy", llama)
    save_adapter(store / "lora", llama, "llama", "lora")
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        for name, column in columns.items():
            model.get_submodule(name).weight += GAIN * column
        expected = model(torch.tensor([TOKENS])).logits[0, -1]
    engine = make_engine(llama, store)
    mixed = forced_logits(engine, [(TOKENS, "lora"), (TOKENS, "toy"), (TOKENS, None)])
    torch.testing.assert_close(mixed[1], expected, rtol=1e-4, atol=1e-4)
    assert (mixed[1] - mixed[2]).abs().max() > 1e-2
    assert (mixed[1] - mixed[0]).abs().max() > 1e-2
    torch.testing.assert_close(merged_logits(engine, TOKENS, "toy"), expected, rtol=1e-4, atol=1e-4)
    (info,) = (info for info in engine.adapters.registry.list() if info.name == "toy")
    assert (info.kind, info.rank, info.primitives) == ("toy", 1, ("low_rank",))


@pytest.mark.usefixtures("with_toy")
def test_its_problems_are_found_and_listed(llama: Path, tmp_path: Path) -> None:
    save_toy(tmp_path / "toy", llama)
    config = json.loads((tmp_path / "toy" / "adapter_config.json").read_text())
    config["target_modules"] = ["v_proj"]
    (tmp_path / "toy" / "adapter_config.json").write_text(json.dumps(config))
    report = check_folder(tmp_path / "toy", ServerConfig(model=str(llama)))
    assert not report.fits
    assert "tensor base_model.model.model.layers.0.self_attn.v_proj.toy_column is missing" in report.problems


@pytest.mark.usefixtures("with_toy")
def test_the_documents_tables_have_it() -> None:
    assert "| toy | `TOY` | mixed | low-rank side path of rank 1 | rows |" in served(find_kinds())
