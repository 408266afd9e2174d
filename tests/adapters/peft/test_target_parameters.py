"""LoRA on experts: what is read from a folder, and every class of damage that is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from polygraft.adapters.files.folder import WEIGHTS
from polygraft.adapters.limits import AdapterLimits
from polygraft.base.loader import inspect_without_weights
from polygraft.config import ServerConfig
from polygraft.core.primitives import ExpertLowRank
from polygraft.core.spec import BaseSpec
from polygraft.engine.check import check_folder
from polygraft.errors import AdapterInvalid
from tests.adapters.specimen import Specimen, compile_folder
from tests.architectures import MATRIX
from tests.peft_folders import CAUSAL, save_adapter
from tests.tiny import save_random_model

UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
PARAMETERS = [UP, DOWN, "gate.weight"]
EXPERTS0 = "base_model.model.model.layers.0.mlp.experts"
ROUTER0 = "base_model.model.model.layers.0.mlp.gate"
UP0_A, UP0_B = f"{EXPERTS0}.base_layer.lora_A.weight", f"{EXPERTS0}.base_layer.lora_B.weight"
DOWN0_A, DOWN0_B = f"{EXPERTS0}.lora_A.weight", f"{EXPERTS0}.lora_B.weight"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("mixtral")
    return save_random_model(folder, "mixtral", dict(MATRIX["mixtral"].config), vectors=True)


@pytest.fixture(scope="module")
def base(mixtral: Path) -> BaseSpec:
    return inspect_without_weights(str(mixtral))


@pytest.fixture(scope="module")
def saved(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On attention, experts and routers."""
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=PARAMETERS,
        rank_pattern={DOWN: 2},
        alpha_pattern={r"0\.mlp\.gate\.weight": 5},
        **CAUSAL,
    )
    return save_adapter(tmp_path_factory.mktemp("experts") / "a", mixtral, "mixtral", config)


@pytest.fixture
def adapter(saved: Path) -> Specimen:
    return Specimen.load(saved)


def problems(specimen: Specimen, base: BaseSpec, folder: Path, limits: AdapterLimits | None = None) -> Any:
    with pytest.raises(AdapterInvalid) as caught:
        compile_folder(specimen.save(folder / "damaged"), base, limits)
    assert len(str(caught.value)) < 20_000
    return caught.value.problems


def test_what_is_read(saved: Path, base: BaseSpec) -> None:
    compiled, tensors = compile_folder(saved, base), load_file(saved / WEIGHTS)
    assert (compiled.kind, compiled.primitives) == ("lora", ("low_rank", "expert_low_rank"))
    assert (compiled.num_modules, compiled.rank) == (2 + 2 * 2 + 2, 3)
    assert sorted(compiled.ranks) == [2, 2, 3, 3, 3, 3, 3, 3]
    assert compiled.mergeable
    assert compiled.in_bank
    assert not compiled.merged_only
    assert set(compiled.experts) == {f"model.layers.{i}.{name}" for i in (0, 1) for name in (UP, DOWN)}
    assert {name for name in compiled.modules if name.endswith(".gate")} == {
        f"model.layers.{i}.mlp.gate" for i in (0, 1)
    }
    # The base has 4 experts of 64 and 2 * 128 numbers. In the file, the one that comes last lies outermost, A
    # holds an expert's ranks behind each other, and B the experts of one rank.
    for name, (a, b), rank, (inputs, outputs) in (
        (UP, (UP0_A, UP0_B), 3, (64, 256)),
        (DOWN, (DOWN0_A, DOWN0_B), 2, (128, 64)),
    ):
        primitive = compiled.experts[f"model.layers.0.{name}"]
        assert (primitive.a.shape, primitive.b.shape) == ((4, rank, inputs), (4, outputs, rank))
        for expert in range(4):
            for r in range(rank):
                assert torch.equal(primitive.a[expert, r], tensors[a][expert * rank + r])
                assert torch.equal(primitive.b[expert, :, r], tensors[b][:, r * 4 + expert])
    router = compiled.modules["model.layers.0.mlp.gate"].low_rank
    assert torch.equal(router.a, tensors[f"{ROUTER0}.lora_A.weight"])
    assert torch.equal(router.b, tensors[f"{ROUTER0}.lora_B.weight"])
    assert router.scaling == 5 / 3
    shapes = compiled.without_layer_weights()
    assert shapes.experts[f"model.layers.0.{UP}"].a.is_meta
    assert shapes.compiled_bytes == compiled.compiled_bytes == sum(t.nbytes for t in tensors.values())


def test_a_check_without_the_bases_weights(saved: Path, mixtral: Path) -> None:
    report = check_folder(saved, ServerConfig(model=str(mixtral)))
    assert report.fits
    assert report.primitives == ("low_rank", "expert_low_rank")
    assert (report.modules, report.ranks, report.rank) == (8, {2: 2, 3: 6}, 3)


@pytest.mark.parametrize("targets", [["down_proj"], [DOWN], [f"model.layers.1.{DOWN}"]])
def test_one_parameter_alone_lies_at_the_top(
    mixtral: Path, base: BaseSpec, tmp_path: Path, targets: list[str]
) -> None:
    config = LoraConfig(r=2, target_parameters=targets, **CAUSAL)
    folder = save_adapter(tmp_path / "a", mixtral, "mixtral", config)
    compiled = compile_folder(folder, base)
    layers = (1,) if targets[0].startswith("model") else (0, 1)
    assert set(compiled.experts) == {f"model.layers.{i}.{DOWN}" for i in layers}
    assert not compiled.each("low_rank")
    adapter = Specimen.load(folder)
    for nothing in (None, [], ""):
        adapter.config["target_modules"] = nothing
        again = compile_folder(adapter.save(tmp_path / "again"), base)
        assert again.experts.keys() == compiled.experts.keys()


def test_what_peft_passes_over_is_passed_over(adapter: Specimen, base: BaseSpec, tmp_path: Path) -> None:
    """PEFT chooses layers and excludes modules among modules alone."""
    adapter.config.update(exclude_modules=["experts", "gate"], layers_to_transform=[0])
    for name in [name for name in adapter.tensors if "layers.1.self_attn" in name]:
        del adapter.tensors[name]
    compiled = compile_folder(adapter.save(tmp_path / "a"), base)
    assert (len(compiled.experts), len(compiled.each("low_rank"))) == (4, 2 + 1)


def test_all_linear_on_a_base_whose_router_has_another_name(
    adapter: Specimen, base: BaseSpec, tmp_path: Path
) -> None:
    """PEFT names `gate.weight` there too, and finds none."""
    others = {name: kind for name, kind in base.others.items() if not name.endswith(".gate")}
    renamed = dataclasses.replace(base, others=others, routers={})
    for name in [name for name in adapter.tensors if ".gate." in name]:
        del adapter.tensors[name]
    compiled = compile_folder(adapter.save(tmp_path / "a"), renamed)
    assert not any(name.endswith(".gate") for name in compiled.modules)
    # One that is there but isn't known to choose by row is refused.
    unknown = dataclasses.replace(base, routers={})
    (problem,) = problems(adapter, unknown, tmp_path)
    assert problem == (
        "target_parameters: 'gate.weight' is no weight of experts or of a router, and others aren't served"
    )


def test_limits(adapter: Specimen, base: BaseSpec, tmp_path: Path) -> None:
    assert problems(adapter, base, tmp_path, AdapterLimits(rank=2)) == (
        "rank 3 is over the limit of 2 (--max-adapter-rank)",
    )
    size = compile_folder(adapter.save(tmp_path / "a"), base).compiled_bytes
    compile_folder(adapter.save(tmp_path / "a"), base, AdapterLimits(dtype=torch.bfloat16))
    halved = compile_folder(tmp_path / "a", base, AdapterLimits(dtype=torch.bfloat16)).compiled_bytes
    assert 2 * halved == size


NO_MEANING = "with target_parameters has no meaning in PEFT"
OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"lora_dropout": 0.1}, f"lora_dropout {NO_MEANING}"),
    ({"fan_in_fan_out": True}, f"fan_in_fan_out {NO_MEANING}"),
    ({"lora_bias": True}, f"lora_bias {NO_MEANING}"),
    ({"use_dora": True}, f"use_dora {NO_MEANING}"),
    ({"alora_invocation_tokens": [1, 2]}, f"alora_invocation_tokens {NO_MEANING}"),
    ({"init_lora_weights": "orthogonal"}, f"init_lora_weights {NO_MEANING}"),
    ({"init_lora_weights": "mica"}, f"init_lora_weights {NO_MEANING}"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base's weights"),
    ({"target_parameters": "mlp.experts"}, "target_parameters has the wrong type: 'mlp.experts'"),
    ({"target_parameters": {"mlp": 1}}, "target_parameters has the wrong type: {'mlp': 1}"),
    ({"target_parameters": [*PARAMETERS, "w"]}, "target_parameters: 'w' is no weight of experts or of a router"),
    ({"target_parameters": [*PARAMETERS, 7]}, "target_parameters: 7 is no weight of experts or of a router"),
    ({"target_parameters": [*PARAMETERS, None]}, "target_parameters: None is no weight of experts"),
    ({"target_parameters": [*PARAMETERS, ""]}, "target_parameters: '' is no weight of experts"),
    ({"target_parameters": [*PARAMETERS, "q_proj.weight"]}, "target_parameters: 'q_proj.weight' is no weight"),
    ({"target_parameters": [*PARAMETERS, "x" * 100_000]}, "target_parameters: 'xxx"),
    ({"target_parameters": [UP, DOWN]}, f"tensor {ROUTER0}.lora_A.weight isn't expected"),
    # PEFT would look for the other one's tensors at the top.
    ({"target_parameters": [UP, "gate.weight"]}, f"tensor {DOWN0_A} has shape [8, 128], expected [12, 64]"),
    ({"target_parameters": None}, f"tensor {DOWN0_A} isn't expected"),
    ({"target_modules": []}, "tensor base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight isn't"),
    ({"target_modules": ["w1"]}, "target 'w1' matches no module of the base"),
    ({"target_modules": ["experts"]}, "target model.layers.0.mlp.experts is a MixtralExperts"),
    ({"modules_to_save": ["experts"]}, "modules_to_save has model.layers.0.mlp.experts, a MixtralExperts"),
    ({"rank_pattern": {}}, f"tensor {DOWN0_A} has shape [8, 128], expected [12, 128]"),
    ({"rank_pattern": {DOWN: 0}}, "rank 0 with alpha 6 for model.layers.0.mlp.experts.down_proj isn't valid"),
    ({"rank_pattern": {DOWN: 10**30}}, "isn't valid"),
    ({"rank_pattern": {"(": 2}}, "rank_pattern is not a regular expression"),
    ({"alpha_pattern": {UP: math.nan}}, "rank 3 with alpha nan for model.layers.0.mlp.experts.gate_up_proj"),
    ({"alpha_pattern": {UP: 1e300}}, "makes weights of model.layers.0.mlp.experts.gate_up_proj infinite"),
    ({"peft_type": "ADALORA"}, "isn't served: only LoRA adapts parameters that are no module's weight"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), OPTIONS, ids=[str(options)[:70] for options, _ in OPTIONS])
def test_configurations_that_cant_be_served(
    adapter: Specimen, base: BaseSpec, tmp_path: Path, options: dict[str, Any], expected: str
) -> None:
    adapter.config.update(options)
    found = problems(adapter, base, tmp_path)
    assert any(expected in problem for problem in found), found


REFUSED_BY_PEFT: list[dict[str, Any]] = [
    {"lora_dropout": 0.1},
    {"fan_in_fan_out": True},
    {"lora_bias": True},
    {"use_dora": True},
    {"alora_invocation_tokens": [1, 2]},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "mica"},
]


@pytest.mark.parametrize("options", REFUSED_BY_PEFT, ids=[str(options) for options in REFUSED_BY_PEFT])
def test_peft_refuses_them_too(mixtral: Path, options: dict[str, Any]) -> None:
    config = LoraConfig(r=4, target_modules=[], target_parameters=[UP], **options, **CAUSAL)
    with pytest.raises(
        (ValueError, AttributeError), match=r"ParamWrapper|variant combination|attribute 'weight'"
    ):
        get_peft_model(AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32), config)


def poked(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(t: torch.Tensor) -> torch.Tensor:
        t.view(-1)[-1] = value
        return t

    return apply


TENSORS: list[tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = [
    (UP0_A, lambda t: t[1:], "has shape [11, 64], expected [12, 64]"),
    (UP0_A, lambda t: t.view(4, 3, 64), "has shape [4, 3, 64], expected [12, 64]"),
    (UP0_B, torch.t, "has shape [12, 256], expected [256, 12]"),
    (DOWN0_A, lambda t: t[:, 1:], "has shape [8, 127], expected [8, 128]"),
    (DOWN0_B, lambda t: t[:, :4], "has shape [64, 4], expected [64, 8]"),
    (f"{ROUTER0}.lora_A.weight", lambda t: t[:2], "has shape [2, 64], expected [3, 64]"),
    (f"{ROUTER0}.lora_B.weight", torch.t, "has shape [3, 4], expected [4, 3]"),
    (UP0_B, poked(math.nan), "holds NaN or infinity"),
    (DOWN0_A, poked(math.inf), "holds NaN or infinity"),
    (f"{ROUTER0}.lora_B.weight", poked(-math.inf), "holds NaN or infinity"),
    (DOWN0_B, torch.Tensor.int, "has type torch.int32"),
    (UP0_A, torch.Tensor.double, "has type torch.float64"),
]


@pytest.mark.parametrize(
    ("name", "change", "expected"), TENSORS, ids=[f"{t[0][-30:]} {t[2]}" for t in TENSORS]
)
def test_damaged_tensors(
    adapter: Specimen,
    base: BaseSpec,
    tmp_path: Path,
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    expected: str,
) -> None:
    adapter.tensors[name] = change(adapter.tensors[name]).contiguous()
    (problem,) = problems(adapter, base, tmp_path)
    assert problem.startswith(f"tensor {name} {expected}")


@pytest.mark.parametrize("name", [UP0_A, UP0_B, DOWN0_A, DOWN0_B, f"{ROUTER0}.lora_A.weight"])
def test_missing_and_surplus_tensors(adapter: Specimen, base: BaseSpec, tmp_path: Path, name: str) -> None:
    whole = adapter.tensors.pop(name)
    assert problems(adapter, base, tmp_path) == (f"tensor {name} is missing",)
    adapter.tensors[name] = whole
    deeper = name.replace(".lora_", ".base_layer.base_layer.lora_")
    adapter.tensors[deeper] = whole.clone()
    assert problems(adapter, base, tmp_path) == (f"tensor {deeper} isn't expected",)


def test_a_base_with_other_experts(adapter: Specimen, base: BaseSpec, tmp_path: Path) -> None:
    fewer = {name: dataclasses.replace(shape, experts=2) for name, shape in base.experts.items()}
    found = problems(adapter, dataclasses.replace(base, experts=fewer), tmp_path)
    assert f"tensor {DOWN0_A} has shape [8, 128], expected [4, 128]" in found


def test_a_base_without_experts(adapter: Specimen, specs: Callable[[str], BaseSpec], tmp_path: Path) -> None:
    found = problems(adapter, specs("llama"), tmp_path)
    assert (
        "target_parameters: 'mlp.experts.gate_up_proj' is no weight of experts or of a router, and others "
        "aren't served, and this base has none that are known"
    ) in found


def test_ranks_of_a_primitive() -> None:
    assert ExpertLowRank(torch.zeros(4, 3, 7), torch.zeros(4, 5, 3)).rank == 3
