"""Multitask prompts, CPT and Cartridges: what they compile to, and what can be wrong with them alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polygraft.adapters.limits import AdapterLimits
from polygraft.core.primitives import Prefix, SoftPrompt
from polygraft.core.spec import BaseSpec
from polygraft.errors import AdapterInvalid
from tests.adapters.specimen import Specimen, compile_folder, split

Make = Callable[[str], Specimen]


def several_tasks(specimen: Make, tasks: int) -> Specimen:
    """A multitask folder with more than one task, as PEFT saves it."""
    adapter = specimen("multitask-prompt")
    adapter.config["num_tasks"] = tasks
    generator = torch.Generator().manual_seed(0)
    for name in ("prefix_task_cols", "prefix_task_rows"):
        shape = (tasks, *adapter.tensors[name].shape[1:])
        adapter.tensors[name] = torch.randn(shape, generator=generator)
    return adapter


def test_several_tasks_are_refused_and_split_as_the_document_says(
    specimen: Make, spec: BaseSpec, tmp_path: Path
) -> None:
    together = several_tasks(specimen, 3)
    with pytest.raises(AdapterInvalid) as caught:
        compile_folder(together.save(tmp_path / "all"), spec)
    (problem,) = caught.value.problems
    assert problem.startswith("it holds 3 tasks, and an adapter is one; make a folder for each task t")
    split(tmp_path / "all")
    for task in range(3):
        prompt = compile_folder(tmp_path / f"all-{task}", spec).prefix
        assert isinstance(prompt, SoftPrompt)
        columns, rows = together.tensors["prefix_task_cols"][task], together.tensors["prefix_task_rows"][task]
        torch.testing.assert_close(
            prompt.embeddings, together.tensors["prompt_embeddings"] * (columns @ rows)
        )


def test_a_multitask_prompt_is_rounded_once(specimen: Make, spec: BaseSpec, tmp_path: Path) -> None:
    folder = specimen("multitask-prompt").save(tmp_path / "a")
    wide = compile_folder(folder, spec).prefix
    kept = compile_folder(folder, spec, AdapterLimits(dtype=torch.bfloat16)).prefix
    assert isinstance(wide, SoftPrompt)
    assert isinstance(kept, SoftPrompt)
    assert torch.equal(kept.embeddings, wide.embeddings.bfloat16())


def test_cpt_and_cartridge_are_kept_as_they_are(specimen: Make, spec: BaseSpec, tmp_path: Path) -> None:
    cpt = specimen("cpt")
    compiled = compile_folder(cpt.save(tmp_path / "cpt"), spec)
    assert (compiled.kind, compiled.primitives, compiled.virtual_tokens) == ("cpt", ("soft_prompt",), 5)
    assert isinstance(compiled.prefix, SoftPrompt)
    assert torch.equal(compiled.prefix.embeddings, cpt.tensors["prompt_embeddings"])
    cartridge = specimen("cartridge")
    compiled = compile_folder(cartridge.save(tmp_path / "cartridge"), spec)
    assert (compiled.kind, compiled.primitives, compiled.virtual_tokens) == ("cartridge", ("prefix",), 9)
    assert isinstance(compiled.prefix, Prefix)
    table = cartridge.tensors["prompt_embeddings"].view(9, 6, 2, 16)
    assert torch.equal(torch.stack(compiled.prefix.keys, dim=1), table[:, ::2])
    assert torch.equal(torch.stack(compiled.prefix.values, dim=1), table[:, 1::2])


OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("multitask-prompt", {"num_tasks": 0}, "num_tasks 0 with num_ranks 2 isn't valid"),
    ("multitask-prompt", {"num_tasks": "1"}, "num_tasks has the wrong type: '1'"),
    ("multitask-prompt", {"num_tasks": 2}, "it holds 2 tasks, and an adapter is one"),
    ("multitask-prompt", {"num_ranks": 0}, "num_tasks 1 with num_ranks 0 isn't valid"),
    ("multitask-prompt", {"num_ranks": 3}, "tensor prefix_task_rows has shape [1, 2, 64], expected [1, 3, 64]"),
    ("cpt", {"cpt_token_ids": [1, 2]}, "num_virtual_tokens is 5, cpt_token_ids has 2"),
    ("cpt", {"cpt_token_ids": None}, "num_virtual_tokens is 5, cpt_token_ids has 1"),
    ("cpt", {"cpt_token_ids": 5}, "cpt_token_ids has the wrong type: 5"),
    ("cartridge", {"num_layers": 6}, "num_layers is 6, the base has 3"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options", "expected"), OPTIONS, ids=[f"{kind}-{str(o)[:60]}" for kind, o, _ in OPTIONS]
)
def test_configurations_that_cant_be_served(
    specimen: Make, spec: BaseSpec, tmp_path: Path, kind: str, options: dict[str, Any], expected: str
) -> None:
    damaged = specimen(kind)
    damaged.config.update(options)
    with pytest.raises(AdapterInvalid) as caught:
        compile_folder(damaged.save(tmp_path / "a"), spec)
    assert any(expected in problem for problem in caught.value.problems), caught.value.problems


def test_a_product_that_overflows(specimen: Make, spec: BaseSpec, tmp_path: Path) -> None:
    damaged = specimen("multitask-prompt")
    for name in ("prefix_task_cols", "prefix_task_rows"):
        damaged.tensors[name].fill_(1e30)
    with pytest.raises(AdapterInvalid, match="the arithmetic makes weights of the prompt infinite"):
        compile_folder(damaged.save(tmp_path / "a"), spec)
