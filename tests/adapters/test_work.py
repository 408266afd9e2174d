"""What small folders cost: work is linear in the file, comes in slices, and has an end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polygraft.adapters.compile import compile_adapter
from polygraft.adapters.files.reader import MAX_ENTRIES
from polygraft.adapters.files.store import read_folder
from polygraft.adapters.limits import AdapterLimits
from polygraft.core.spec import BaseSpec
from polygraft.errors import AdapterInvalid
from tests.adapters.specimen import Specimen, compile_folder

LAYERS = 200  # a base with as many modules as the largest


@pytest.fixture
def large(spec: BaseSpec) -> BaseSpec:
    """A base of many layers."""
    linears, others = dict(spec.linears), dict(spec.others)
    for known in (linears, others):
        for name, shape in list(known.items()):
            if ".layers.0" in name:
                known.update({name.replace(".0", f".{n}", 1): shape for n in range(LAYERS)})
    return dataclasses.replace(spec, linears=linears, others=others)


def slices(folder: Path, base: BaseSpec) -> tuple[list[float], AdapterInvalid | None]:
    """Processor time of each slice of a folder's compilation, and why it was refused."""
    job = compile_adapter(read_folder("a", folder, 2**30), base, AdapterLimits())
    spent: list[float] = []
    while True:
        began = time.thread_time()
        try:
            next(job)
        except StopIteration:
            return spent, None
        except AdapterInvalid as error:
            return spent, error
        finally:
            spent.append(time.thread_time() - began)


N = MAX_ENTRIES
SMALL: list[tuple[str, dict[str, Any], str]] = [
    ("layers_pattern", {"layers_to_transform": list(range(100)), "layers_pattern": [f"x{n}" for n in range(1200)]},
     "layers_pattern has 1200 entries, the limit is 64"),
    ("64 layers_pattern", {"layers_to_transform": list(range(N)), "layers_pattern": [f"(x{n}|y)+" for n in range(64)]},
     "leaves no module"),
    ("modules_to_save", {"modules_to_save": [f"x{n}.y" for n in range(N)]}, ""),
    ("modules_to_save patterns", {"modules_to_save": [f"(x|{n})+" for n in range(N)]}, "aren't plain names"),
    ("rank_pattern", {"rank_pattern": {f"x{n}.y": 4 for n in range(N)}}, ""),
    ("rank_pattern regex", {"rank_pattern": {f"(x|{n})+": 4 for n in range(100)}}, ""),
    ("alpha_pattern", {"alpha_pattern": {f"x{n}|y": 4 for n in range(N)}}, "aren't plain names"),
    ("slow patterns", {"rank_pattern": {rf"(?:\w|\w\w|\.|{n})+[!?]": 4 for n in range(100)}}, "too long"),
    ("target_modules", {"target_modules": ["q_proj", "v_proj", "down_proj", *(f"x{n}" for n in range(N - 3))]}, ""),
    ("exclude_modules", {"exclude_modules": [f"x{n}" for n in range(N)]}, ""),
    ("slow target", {"target_modules": r"(?:\w|\w\w|\.)+[!?]"}, "too long"),
    ("target_parameters", {"target_parameters": [f"x{n}" for n in range(N)]}, "is no weight of experts"),
    ("too many", {"target_modules": [f"x{n}" for n in range(N + 1)]}, f"the limit is {N}"),
    ("nested parentheses", {"target_modules": "(" * 20_000 + ")" * 20_000}, "the limit is 4096"),
    ("a large value", {"rank_pattern": {"q_proj": [[0] * 1000] * 300}}, "isn't valid"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), [s[1:] for s in SMALL], ids=[s[0] for s in SMALL])
def test_small_configurations_cost_little(
    specimen: Callable[[str], Specimen],
    large: BaseSpec,
    tmp_path: Path,
    options: dict[str, Any],
    expected: str,
) -> None:
    adapter = specimen("lora")
    adapter.config.update(options)
    modules = [name for name in large.linears if name.endswith(("q_proj", "v_proj", "down_proj"))]
    for module in modules:
        shape = large.linears[module]
        adapter.tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(4, shape.in_features)
        adapter.tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(shape.out_features, 4)
    spent, error = slices(adapter.save(tmp_path / "a"), large)
    # Generous, since other processes take turns on the same cores; it was a minute and more.
    assert sum(spent) < 15
    assert max(spent) < 1.5
    assert expected in str(error or "")
    assert bool(expected) == (error is not None)


def test_a_compilation_has_an_end(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    folder = specimen("lora").save(tmp_path / "a")
    with pytest.raises(AdapterInvalid, match="compiling it takes more than 0 s"):
        compile_folder(folder, spec, AdapterLimits(seconds=0))


@pytest.mark.parametrize("error", [RecursionError, OverflowError, MemoryError, RuntimeError, BaseException])
def test_whatever_goes_wrong_is_a_reason(
    specimen: Callable[[str], Specimen],
    spec: BaseSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    folder = specimen("lora").save(tmp_path / "a")

    def fail(*_: object, **__: object) -> None:
        raise error("some\nreason")

    monkeypatch.setattr("polygraft.adapters.peft.lora.find_targets", fail)
    with pytest.raises(AdapterInvalid, match=r"can't be read: some\\nreason"):
        compile_folder(folder, spec)
