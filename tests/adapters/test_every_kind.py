"""What holds of every kind, in one table: a damaged folder of any of them is refused, and the text says why."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from polygraft.adapters.kinds import KINDS as SERVED
from polygraft.core.spec import BaseSpec
from polygraft.errors import AdapterInvalid
from tests.adapters.conftest import CheckIgnored
from tests.adapters.specimen import Specimen, compile_folder
from tests.peft_folders import KINDS

VIRTUAL = ("prefix", "prefix-projection", "prompt", "p-tuning", "multitask-prompt", "cpt", "cartridge")
ON_MODULES = [kind for kind in KINDS if kind not in VIRTUAL]
# The same tensor with the same meaning, whatever it is called.
ALIKE = [{"PREFIX_TUNING", "CARTRIDGE"}, {"PROMPT_TUNING", "P_TUNING", "CPT"}]
NO_TYPES = ["", "LORA ", "BONE", "lora", 7, None, ["LORA"], {"LORA": 1}]


@pytest.fixture
def refused(spec: BaseSpec, tmp_path: Path) -> Callable[[Specimen], tuple[str, ...]]:
    """Why a specimen isn't loaded."""
    number = itertools.count()

    def get(specimen: Specimen) -> tuple[str, ...]:
        with pytest.raises(AdapterInvalid) as caught:
            compile_folder(specimen.save(tmp_path / str(next(number))), spec)
        assert len(str(caught.value)) < 20_000
        return caught.value.problems

    return get


def one_of_each(specimen: Specimen) -> Iterator[str]:
    """A tensor of every sort that a folder holds: the last with each ending."""
    yield from {name.split(".")[-2:][0] + name[-3:]: name for name in specimen.tensors}.values()


def without_copies(specimen: Specimen) -> Specimen:
    """Without the copies of RandLoRA's shared factors that PEFT saves with every module: they may be missing."""
    copies = [name for name in specimen.tensors if re.search(r"_proj\.randlora_[AB]$", name)]
    for name in copies:
        del specimen.tensors[name]
    return specimen


@pytest.mark.parametrize("kind", KINDS)
def test_tensors(
    specimen: Callable[[str], Specimen], refused: Callable[[Specimen], tuple[str, ...]], kind: str
) -> None:
    for name in one_of_each(without_copies(specimen(kind))):
        damaged = without_copies(specimen(kind))
        whole = damaged.tensors.pop(name)
        assert refused(damaged) == (f"tensor {name} is missing",)
        damaged.tensors[f"{name}.more"] = whole
        assert refused(damaged) == (f"tensor {name} is missing", f"tensor {name}.more isn't expected")
        damaged = without_copies(specimen(kind))
        damaged.tensors[name] = whole[None]
        (problem,) = refused(damaged)
        assert problem.startswith(f"tensor {name} has shape [1, ")
        floats = whole.is_floating_point()
        for wrong in (whole.double(), whole.int() if floats else whole.float(), whole.to(torch.complex64)):
            damaged.tensors[name] = wrong
            assert refused(damaged)[0].startswith(f"tensor {name} has type torch.")
        if not whole.numel():
            continue
        damaged.tensors[name] = whole[..., 1:].contiguous()
        *why, problem = refused(damaged)
        # The only tensor of a soft prompt shows what base it was made for.
        assert bool(why) == (len(damaged.tensors) == 1 and kind in ("prompt", "p-tuning", "cpt")), why
        assert problem.startswith(f"tensor {name} has shape [")
        if not floats:
            damaged.tensors[name] = whole.long()
            damaged.tensors[name].view(-1)[-1] = -1
            assert refused(damaged)[0].startswith(f"tensor {name} holds an index that isn't in [0, ")
            continue
        for bad in (math.nan, math.inf):
            damaged.tensors[name] = whole.clone()
            damaged.tensors[name].view(-1)[-1] = bad
            assert refused(damaged) == (f"tensor {name} holds NaN or infinity",)


@pytest.mark.parametrize("kind", KINDS)
def test_options(
    specimen: Callable[[str], Specimen],
    refused: Callable[[Specimen], tuple[str, ...]],
    check_ignored: CheckIgnored,
    kind: str,
) -> None:
    for value in (1, {"a": None}):
        check_ignored(kind, {"invented": value})
    check_ignored(kind, {"merge_weights": True, "invented": "x" * 100_000})
    damaged = specimen(kind)
    damaged.config["task_type"] = "SEQ_CLS"
    assert refused(damaged) == ("task_type 'SEQ_CLS' isn't causal language modelling",)


@pytest.mark.parametrize("kind", KINDS)
def test_another_kinds_name(
    specimen: Callable[[str], Specimen], refused: Callable[[Specimen], tuple[str, ...]], kind: str
) -> None:
    own = specimen(kind).config["peft_type"]
    for other in [*SERVED, *NO_TYPES]:
        damaged = specimen(kind)
        damaged.config["peft_type"] = other
        if other != own and not any(own in kinds and str(other) in kinds for kinds in ALIKE):
            assert refused(damaged)


@pytest.mark.parametrize("kind", ON_MODULES)
def test_targets(
    specimen: Callable[[str], Specimen], refused: Callable[[Specimen], tuple[str, ...]], kind: str
) -> None:
    damaged = specimen(kind)
    damaged.config["target_modules"] = ["w_proj"]
    assert "target 'w_proj' matches no module of the base" in refused(damaged)
    if list(damaged.tensors) != ["base_model.unilora_theta_d"]:  # which names no module
        damaged.config["target_modules"] = ["o_proj"]
        # A tensor that all modules share has the size of the largest.
        assert any(
            problem.endswith("isn't expected") or "has shape" in problem for problem in refused(damaged)
        )
    damaged.config.update(target_modules=["rotary_emb"], layers_to_transform=None)
    damaged.tensors = {}
    assert "target model.rotary_emb is a LlamaRotaryEmbedding, which this kind isn't served on" in refused(
        damaged
    )
    for nothing in (None, [], "", 3):
        damaged.config["target_modules"] = nothing
        assert any(problem.startswith("target_modules ") for problem in refused(damaged))


@pytest.mark.parametrize("kind", ON_MODULES)
def test_modules_to_save(
    specimen: Callable[[str], Specimen],
    refused: Callable[[Specimen], tuple[str, ...]],
    check_ignored: CheckIgnored,
    kind: str,
) -> None:
    if kind == "trainable-tokens":
        check_ignored(kind, {"modules_to_save": ["mlp"]})
        return
    for value, expected in (
        (["mlp"], "modules_to_save has model.layers.0.mlp, a LlamaMLP: only"),
        (["q_proj"], "modules_to_save has model.layers.0.self_attn.q_proj, a linear module: only"),
        ([None], "modules_to_save must hold names: None"),
        ([""], "modules_to_save must hold names: ''"),
        ("mlp", "modules_to_save has the wrong type: 'mlp'"),
        (["norm"], "tensor base_model.model.model.norm.weight is missing"),
        (["lm_head"], "tensor base_model.model.lm_head.weight is missing"),
    ):
        damaged = specimen(kind)
        if value in (damaged.config["modules_to_save"], ["lm_head"]) and "saved" in kind:
            continue
        damaged.config["modules_to_save"] = value
        assert any(problem.startswith(expected) for problem in refused(damaged))


@pytest.mark.parametrize("kind", ON_MODULES)
def test_names_of_nothing_beside_others(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path, kind: str
) -> None:
    changed = specimen(kind)
    if kind != "trainable-tokens":
        changed.config["modules_to_save"] = [*(changed.config["modules_to_save"] or []), "score", "wlp"]
    if isinstance(changed.config["target_modules"], list):
        changed.config["target_modules"] += ["w_proj", "model.w_proj"]
    warnings = compile_folder(changed.save(tmp_path / "a"), spec).warnings
    expected = {"target 'w_proj' matches no module of the base"}
    expected |= {f"modules_to_save: {name!r} matches no module of the base" for name in ("score", "wlp")}
    missing = {one for one in expected if one not in warnings}
    assert not missing or kind == "trainable-tokens" or not isinstance(changed.config["target_modules"], list)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens(
    specimen: Callable[[str], Specimen], refused: Callable[[Specimen], tuple[str, ...]], kind: str
) -> None:
    for bad in (0, -1, None, "5", True, 1.0, 10**30):
        damaged = specimen(kind)
        damaged.config["num_virtual_tokens"] = bad
        assert refused(damaged)
    damaged = specimen(kind)
    damaged.config["num_transformer_submodules"] = 2
    assert refused(damaged) == ("num_transformer_submodules other than 1 is for encoder-decoder models",)
