"""Kinds that are completed with the base's weights: what they make of these, and what can be wrong with them alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from polygraft.adapters.limits import AdapterLimits
from polygraft.adapters.peft.osf import smaller_part
from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.spec import BaseSpec
from polygraft.engine.check import check_against
from polygraft.errors import AdapterInvalid
from polygraft.layers.linear.merging import dense_weight
from tests.adapters.conftest import CheckRefused
from tests.adapters.specimen import Q0, Specimen, compile_folder
from tests.peft_folders import CAUSAL, TARGETS

ON_ALL: dict[str, Any] = {"target_modules": TARGETS["qwen2"], **CAUSAL}
CONFIGS: dict[str, peft.PeftConfig] = {
    "deft": peft.DeftConfig(r=3, **ON_ALL),
    "deft, scaled": peft.DeftConfig(r=2, alpha=7, layers_to_transform=[1], **ON_ALL),
    "deft, a rank over the module's": peft.DeftConfig(r=50, alpha=5, decomposition_method="qr", **ON_ALL),
    "para": peft.DeftConfig(r=4, para=True, **ON_ALL),
    "peanut": peft.PeanutConfig(r=4, **ON_ALL),
    "peanut, deep": peft.PeanutConfig(r=3, depth=3, act_fn="tanh", scaling=-2, **ON_ALL),
    "peanut, an activation with weights": peft.PeanutConfig(
        r=4, depth=1, act_fn="prelu", target_modules="all-linear", **CAUSAL
    ),
    **{
        f"glora, {of_weight}, {of_both}, {of_bias}": peft.GloraConfig(
            r=2, config_A_B=of_weight, config_C=of_both, config_D_E=of_bias, **ON_ALL
        )
        for of_weight, of_both, of_bias in [
            ("vector", "lora", "vector"),
            ("constant", "vector", "constant"),
            ("vector", "none", "none"),
            ("none", "lora", "vector"),
            ("none", "none", "constant"),
            ("constant", "none", "none"),
        ]
    },
    "osf, few": peft.OSFConfig(effective_rank=0.95, target_modules=["q_proj"], **CAUSAL),
    "osf, by patterns": peft.OSFConfig(
        effective_rank=0.96,
        rank_pattern={r"0\.self_attn": 59, "attn": 60, "k_proj": 1},
        target_modules=["q_proj", "down_proj"],
        **CAUSAL,
    ),
    "osf, more than there are": peft.OSFConfig(
        effective_rank=62, target_modules=["q_proj", "k_proj"], **CAUSAL
    ),
    "para, orthogonal": peft.DeftConfig(r=4, para=True, decomposition_method="qr", **ON_ALL),
}


def saved(folder: Path, base: Path, config: peft.PeftConfig) -> None:
    """Save a random adapter."""
    torch.manual_seed(3)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)


def changed(
    compiled: AdapterWeights, name: str, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A module's weight and bias with an adapter in them."""
    own = weight
    if name in compiled.each("scale"):
        scale = compiled.each("scale")[name]
        assert scale.output is not None
        assert not scale.after_bias
        weight = weight * scale.output[:, None]
    primitive = compiled.each("low_rank")[name]
    if primitive.of_base is not None:
        primitive = primitive.of_base.completed(primitive, own, bias)
    assert not primitive.needs_base
    assert primitive.a.dtype == primitive.b.dtype
    weight = weight + primitive.product
    if primitive.bias is not None:
        assert bias is not None
        bias = bias + primitive.bias
    return weight, bias


@pytest.mark.parametrize("which", CONFIGS)
def test_weights_become_what_they_are_in_peft(
    tiny_model: Callable[[str], Path], specs: Callable[[str], BaseSpec], tmp_path: Path, which: str
) -> None:
    saved(tmp_path / "a", tiny_model("qwen2"), CONFIGS[which])
    compiled = compile_folder(tmp_path / "a", specs("qwen2"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model("qwen2"), dtype=torch.float32)
    before = {}
    for name in compiled.modules:
        module = model.get_submodule(name)
        bias = None if module.bias is None else module.bias.detach().clone()
        before[name] = dense_weight(module).clone(), bias
    merged: Any = peft.PeftModel.from_pretrained(model, str(tmp_path / "a")).merge_and_unload()
    for name, (weight, own_bias) in before.items():
        after = merged.get_submodule(name)
        moved = float((after.weight - weight).abs().max())
        if own_bias is not None:
            moved = max(moved, float((after.bias - own_bias).abs().max()))
        assert moved > 0.01
        found, bias = changed(compiled, name, weight, own_bias)
        tolerance = {"rtol": 1e-4, "atol": 3e-6 * max(1.0, moved)}
        torch.testing.assert_close(found, after.weight.detach(), **tolerance)
        assert (bias is None) == (after.bias is None)
        if bias is not None:
            torch.testing.assert_close(bias, after.bias.detach(), **tolerance)


@pytest.mark.parametrize(
    ("kind", "rank", "modules"),
    [("deft", 4, 9), ("deft-qr", 5, 9), ("deft-para", 3, 9), ("peanut", 6, 9), ("peanut-deep", 5, 9)],
)
def test_what_it_costs_is_what_is_left_when_it_is_completed(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path, kind: str, rank: int, modules: int
) -> None:
    folder = specimen(kind).save(tmp_path / "a")
    compiled = compile_folder(folder, spec)
    primitive = "projection" if compiled.kind == "deft" else "low_rank"
    assert (compiled.primitives, compiled.rank, compiled.num_modules) == ((primitive,), rank, modules)
    assert compiled.mergeable
    shapes = [spec.linears[name] for name in compiled.each("low_rank")]
    left = 4 * rank * sum(shape.in_features + shape.out_features for shape in shapes)
    assert check_against(folder, spec, AdapterLimits()).compiled_bytes == left < compiled.compiled_bytes
    with pytest.raises(AdapterInvalid, match=f"rank {rank} is over the limit of {rank - 1}"):
        compile_folder(folder, spec, AdapterLimits(rank=rank - 1))


OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("deft", {"r": 0}, "r 0 with alpha 6 and decomposition_method 'relu' isn't valid"),
    ("deft", {"r": "4"}, "r has the wrong type: '4'"),
    ("deft", {"r": 3}, f"tensor {Q0}.deft_P has shape [64, 4], expected [64, 3]"),
    ("deft", {"alpha": math.nan}, "with alpha nan and"),
    ("deft", {"alpha": 1e300}, "the arithmetic makes weights of model.layers.0.self_attn.q_proj infinite"),
    ("deft", {"decomposition_method": "svd"}, "decomposition_method 'svd' isn't valid"),
    ("deft", {"para": True}, f"tensor {Q0}.deft_R isn't expected"),
    ("deft", {"para": 1}, "para has the wrong type: 1"),
    ("deft-para", {"para": False}, f"tensor {Q0}.deft_R is missing"),
    ("peanut", {"r": 5}, f"tensor {Q0}.peanut_A.weight has shape [6, 64], expected [5, 64]"),
    ("peanut", {"r": -1}, "r -1 with depth 0, act_fn 'relu' and scaling 0.7 isn't valid"),
    ("peanut", {"depth": 1}, f"tensor {Q0}.peanut_encoders.0.weight is missing"),
    ("peanut", {"depth": 10**9}, "depth 1000000000, act_fn"),
    ("peanut", {"depth": -1}, "depth -1, act_fn"),
    ("peanut", {"act_fn": "step"}, "act_fn 'step' and scaling 0.7 isn't valid"),
    ("peanut", {"scaling": math.inf}, "scaling inf isn't valid"),
    (
        "peanut",
        {"scaling": 1e300},
        "the arithmetic makes weights of model.layers.0.self_attn.q_proj infinite",
    ),
    ("peanut-deep", {"depth": 1}, f"tensor {Q0}.peanut_decoders.1.weight isn't expected"),
    (
        "glora",
        {"r": 0},
        "r 0 with config_A_B 'lora', config_C 'lora' and config_D_E 'constant' isn't valid",
    ),
    ("glora", {"r": 2}, f"tensor {Q0}.glora_A.Xd has shape [64, 3], expected [64, 2]"),
    ("glora", {"config_A_B": "matrix"}, "config_A_B 'matrix', config_C"),
    ("glora", {"config_C": "constant"}, "config_C 'constant' and config_D_E"),
    ("glora", {"config_D_E": "lora"}, "config_D_E 'lora' isn't valid"),
    ("glora", {"config_A_B": 1}, "config_A_B has the wrong type: 1"),
    ("glora", {"config_A_B": "vector"}, f"tensor {Q0}.glora_A.X is missing"),
    ("glora-vector", {"config_A_B": "constant"}, f"tensor {Q0}.glora_A.X has shape [64, 1], expected [1]"),
    ("glora-constant", {"config_A_B": "none"}, f"tensor {Q0}.glora_A.zeros is missing"),
    ("osf", {"effective_rank": 0}, "effective_rank 0 for model.layers.0.self_attn.q_proj isn't valid"),
    ("osf", {"effective_rank": -0.5}, "effective_rank -0.5 for"),
    ("osf", {"effective_rank": math.nan}, "effective_rank nan for"),
    ("osf", {"effective_rank": True}, "effective_rank has the wrong type: True"),
    (
        "osf",
        {"effective_rank": 40},
        f"tensor {Q0}.osf_svd_params.U_low has shape [64, 32], expected [64, 24]",
    ),
    ("osf", {"rank_pattern": {"q_": "3"}}, "effective_rank '3' for model.layers.0.self_attn.q_proj"),
    ("osf", {"rank_pattern": {"(": 3}}, "rank_pattern is not a regular expression that can be matched"),
    ("osf", {"exclude_modules": 3}, "exclude_modules has the wrong type"),
    (
        "frod",
        {"save_projection": False},
        "save_projection=False isn't served: what its numbers multiply isn't in",
    ),
    ("frod", {"sparse_rate": 1.5}, "sparse_rate 1.5 isn't valid"),
    ("frod", {"sparse_rate": math.nan}, "sparse_rate nan isn't valid"),
    ("frod", {"sparse_rate": 0.04}, "frod_s_indices.self_attn_q_proj has shape [2, 204], expected [2, 163]"),
    ("deft", {"bias": "some"}, "bias 'some' means nothing to PEFT"),
]


@pytest.mark.parametrize(
    ("kind", "options", "expected"), OPTIONS, ids=[f"{kind}-{str(o)[:60]}" for kind, o, _ in OPTIONS]
)
def test_configurations_that_cant_be_served(
    check_refused: CheckRefused, kind: str, options: dict[str, Any], expected: str
) -> None:
    check_refused(kind, options, expected)


def test_columns_of_which_orthogonality_leaves_nothing(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    for columns in (torch.ones(64, 5), torch.zeros(64, 5)):
        damaged = specimen("deft-qr")
        damaged.tensors[f"{Q0}.deft_P"] = columns
        with pytest.raises(AdapterInvalid) as caught:
            compile_folder(damaged.save(tmp_path / "a"), spec)
        assert caught.value.problems == (
            "the columns of model.layers.0.self_attn.q_proj's deft_P depend on each other, so qr has no meaning",
        )


def test_glora_is_a_scale_and_a_product_of_rank_one_where_it_can_be(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    made = {
        kind: compile_folder(specimen(kind).save(tmp_path / kind), spec)
        for kind in ("glora", "glora-vector", "glora-constant")
    }
    assert {kind: (c.primitives, c.rank, c.merged_only, c.mergeable) for kind, c in made.items()} == {
        "glora": (("dense",), 0, True, True),
        "glora-vector": (("modulation", "scale"), 1, False, True),
        "glora-constant": (("modulation", "scale"), 1, False, True),
    }


def test_what_stands_for_nothing_must_be_nothing(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    damaged = specimen("glora")
    damaged.tensors[f"{Q0}.glora_D.zeros"][3] = 1e-9
    with pytest.raises(AdapterInvalid) as caught:
        compile_folder(damaged.save(tmp_path / "a"), spec)
    assert caught.value.problems == (f"tensor {Q0}.glora_D.zeros stands for nothing, but isn't zero",)


def test_osf_is_of_low_rank_while_that_is_less_than_the_weight(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    few = compile_folder(specimen("osf-few").save(tmp_path / "few"), spec)
    # Of 64 singular values q_proj keeps 61, of v_proj's 32 the others keep 28, of down_proj's 64 57.
    ranks = {name.split(".")[-1]: primitive.rank for name, primitive in few.each("low_rank").items()}
    assert ranks == {"q_proj": 6, "v_proj": 8, "down_proj": 14}
    assert (few.primitives, few.merged_only) == (("low_rank",), False)
    folder = specimen("osf").save(tmp_path / "half")
    half = compile_folder(folder, spec)
    assert (half.primitives, half.rank, half.merged_only) == (("dense",), 0, True)
    whole = 4 * sum(spec.linears[name].in_features * spec.linears[name].out_features for name in half.modules)
    assert half.compiled_bytes == whole
    with pytest.raises(AdapterInvalid, match=f"over the limit of {whole - 1} bytes"):
        compile_folder(folder, spec, AdapterLimits(compiled_bytes=whole - 1))


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_the_smaller_part_doesnt_depend_on_signs_or_the_order_of_equal_values(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(shape[0], 24, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(shape[1], 24, generator=generator, dtype=torch.float64))
    values = torch.tensor([3.0] * 10 + [0.5] * 14, dtype=torch.float64)
    weight = (left * values) @ right.T
    beyond = min(shape) - 24
    a, b = smaller_part(weight.float(), 14 + beyond)
    torch.testing.assert_close(a @ b, (0.5 * left[:, 10:] @ right[:, 10:].T).float(), rtol=0, atol=1e-6)


def test_a_basis_without_an_inverse(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    name = "base_model.frod_V.self_attn_q_proj"
    whole = specimen("frod").tensors[name]
    for column in (torch.zeros(64), whole[:, 9]):
        damaged = specimen("frod")
        damaged.tensors[name][:, 5] = column
        with pytest.raises(AdapterInvalid) as caught:
            compile_folder(damaged.save(tmp_path / "a"), spec)
        assert caught.value.problems == (f"tensor {name} has no inverse that can be computed",)
    damaged = specimen("frod")
    damaged.tensors["base_model.frod_s_size.self_attn_q_proj"][0] = 60
    with pytest.raises(AdapterInvalid) as caught:
        compile_folder(damaged.save(tmp_path / "a"), spec)
    assert caught.value.problems == ("tensor base_model.frod_s_size.self_attn_q_proj isn't [64, 64]",)


def test_what_modules_of_a_role_share_is_counted_once(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    adapter = specimen("frod")
    compiled = compile_folder(adapter.save(tmp_path / "a"), spec)
    assert compiled.without_layer_weights().compiled_bytes == compiled.compiled_bytes
    # V and its inverse in float64, and where the elements are; sizes are gone.
    numbers = {"frod_V": 4 + 8, "frod_s_indices": 8, "frod_s_size": 0, "frod_lambda": 4}
    expected = sum(
        tensor.numel() * next(n for part, n in numbers.items() if part in name)
        for name, tensor in adapter.tensors.items()
    )
    assert compiled.compiled_bytes == expected
