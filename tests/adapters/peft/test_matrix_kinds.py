"""LoKr, OFT, BOFT and HRA: what they make of a weight, what they cost, and what can be wrong with them alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization
from peft.tuners.oft.layer import OFTLayer
from transformers import AutoModelForCausalLM

from polygraft.adapters.limits import AdapterLimits
from polygraft.adapters.peft.lokr import _divided
from polygraft.adapters.peft.oft import _nearest_divisor
from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.spec import BaseSpec
from polygraft.errors import AdapterInvalid
from tests.adapters.conftest import CheckRefused
from tests.adapters.specimen import Q0, Specimen, compile_folder
from tests.peft_folders import CAUSAL, TARGETS

ALL = TARGETS["llama"]
NEUMANN = {"target_modules": ALL, "oft_block_size": 16}
CONFIGS: dict[str, peft.PeftConfig] = {
    "lokr": peft.LoKrConfig(target_modules="all-linear", **CAUSAL),
    "lokr, first factor a product": peft.LoKrConfig(r=1, decompose_both=True, target_modules=ALL, **CAUSAL),
    "lokr, by four": peft.LoKrConfig(r=2, decompose_factor=4, target_modules=ALL, **CAUSAL),
    "lokr, by what divides nothing": peft.LoKrConfig(r=3, decompose_factor=11, target_modules=ALL, **CAUSAL),
    "lokr, the larger factor first": peft.LoKrConfig(r=2, decompose_factor=32, target_modules=ALL, **CAUSAL),
    "lokr, undivided": peft.LoKrConfig(r=3, decompose_factor=1, target_modules=ALL, **CAUSAL),
    "lokr, patterns": peft.LoKrConfig(
        r=2,
        alpha=3,
        target_modules=ALL,
        rank_pattern={r"1\..*down_proj": 70},
        alpha_pattern={"q_proj": 7},
        rank_dropout=0.5,
        module_dropout=0.5,
        rank_dropout_scale=True,
        use_effective_conv2d=True,
        layers_to_transform=[1, 2],
        **CAUSAL,
    ),
    "oft": peft.OFTConfig(target_modules="all-linear", **CAUSAL),
    "oft, by number": peft.OFTConfig(r=8, oft_block_size=0, target_modules=ALL, **CAUSAL),
    "oft, a size that doesn't divide": peft.OFTConfig(oft_block_size=7, target_modules=ALL, **CAUSAL),
    "oft, a number that doesn't divide": peft.OFTConfig(r=3, oft_block_size=0, target_modules=ALL, **CAUSAL),
    "oft, one block": peft.OFTConfig(oft_block_size=500, target_modules=ALL, **CAUSAL),
    "oft, cayley": peft.OFTConfig(use_cayley_neumann=False, **NEUMANN, **CAUSAL),
    "oft, constrained": peft.OFTConfig(coft=True, eps=2.0, **NEUMANN, **CAUSAL),
    "oft, shared and constrained": peft.OFTConfig(block_share=True, coft=True, eps=0.9, **NEUMANN, **CAUSAL),
    **{
        f"oft, {n} terms": peft.OFTConfig(num_cayley_neumann_terms=n, **NEUMANN, **CAUSAL)
        for n in (2, 3, 4, 6, 9)
    },
    "boft": peft.BOFTConfig(target_modules=ALL, **CAUSAL),
    "boft, by number": peft.BOFTConfig(boft_block_size=0, boft_block_num=8, target_modules=ALL, **CAUSAL),
    "boft, two factors": peft.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2, target_modules=ALL, **CAUSAL),
    "boft, all factors": peft.BOFTConfig(
        boft_block_size=0, boft_block_num=32, boft_n_butterfly_factor=5, target_modules=["q_proj"], **CAUSAL
    ),
    "hra": peft.HRAConfig(target_modules="all-linear", **CAUSAL),
    "hra, one": peft.HRAConfig(r=1, target_modules=ALL, **CAUSAL),
    "hra, orthogonal": peft.HRAConfig(r=5, apply_GS=True, target_modules=ALL, **CAUSAL),
}  # fmt: skip


def folded(compiled: AdapterWeights, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that an adapter changes as they are with it, in float64."""
    merged = {}
    for name in compiled.modules:
        weight = own = weights[f"{name}.weight"].double()
        if name in compiled.each("rotation"):
            blocks = compiled.each("rotation")[name].blocks.double()
            count = weight.shape[1] // blocks.shape[-1]
            weight = weight @ torch.block_diag(*blocks.expand(count, -1, -1)).T
        if name in compiled.each("scale"):
            scale = compiled.each("scale")[name].output
            assert scale is not None
            weight = weight * scale[:, None]
        if name in compiled.each("kron"):
            kron = compiled.each("kron")[name]
            weight = weight + torch.kron(kron.w1.double(), kron.w2.double())
        if name in compiled.each("low_rank"):
            low_rank = compiled.each("low_rank")[name]
            assert low_rank.through_base
            weight = weight + own @ low_rank.b.double() @ low_rank.a.double()
        merged[name] = weight.float()
    return merged


@pytest.mark.parametrize("which", CONFIGS)
def test_weights_become_what_they_are_in_peft(
    llama: Path, spec: BaseSpec, tmp_path: Path, which: str
) -> None:
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    weights = {name: weight.clone() for name, weight in base.state_dict().items()}
    model = peft.get_peft_model(base, CONFIGS[which])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(mean=1.0 if "boft_s" in name else 0.0, std=0.1 if "oft_R" in name else 0.4)
    model.save_pretrained(tmp_path / "a")
    loaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), str(tmp_path / "a")
    )
    expected = loaded.merge_and_unload().state_dict()
    found = folded(compile_folder(tmp_path / "a", spec), weights)
    changed = {
        name.removesuffix(".weight") for name, old in weights.items() if not torch.equal(old, expected[name])
    }
    assert set(found) == changed
    for name, weight in found.items():
        assert (expected[f"{name}.weight"] - weights[f"{name}.weight"]).abs().max() > 0.01
        torch.testing.assert_close(weight, expected[f"{name}.weight"], rtol=1e-4, atol=5e-6)


def test_sizes_are_cut_as_peft_cuts_them() -> None:
    adjust = OFTLayer.adjust_oft_parameters
    for dimension in (1, 2, 7, 12, 36, 64, 97, 100, 127, 128, 576, 1536, 49152, 50257):
        for factor in (-5, -1, 0, 1, 2, 3, 5, 8, 12, 24, 32, 33, 100, 576, 10**6, 10**18):
            assert _divided(dimension, factor) == factorization(dimension, factor), (dimension, factor)
            if factor > 0 and dimension % factor:
                assert _nearest_divisor(dimension, factor) == adjust(None, dimension, factor)


def test_a_kronecker_product_is_small_and_a_product_of_rank_r_is_larger(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    lokr = compile_folder(specimen("lokr").save(tmp_path / "a"), spec)
    # Kept in float32, as many numbers as the file has.
    assert lokr.compiled_bytes == 4 * lokr.parameters
    assert (lokr.primitives, lokr.rank, lokr.num_modules, lokr.mergeable) == (("kron",), 0, 21, True)
    half = compile_folder(specimen("lokr").save(tmp_path / "b"), spec, AdapterLimits(dtype=torch.bfloat16))
    assert half.compiled_bytes == lokr.compiled_bytes
    products = compile_folder(specimen("lokr-products").save(tmp_path / "c"), spec)
    assert products.compiled_bytes > 4 * products.parameters


def test_what_the_others_compile_to(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    made = {
        kind: compile_folder(specimen(kind).save(tmp_path / kind), spec)
        for kind in ("oft", "oft-constrained", "boft", "hra")
    }
    assert {kind: compiled.primitives for kind, compiled in made.items()} == {
        "oft": ("rotation",),
        "oft-constrained": ("rotation",),
        "boft": ("scale", "rotation"),
        "hra": ("reflection",),
    }
    q = "model.layers.0.self_attn.q_proj"
    assert made["oft"].each("rotation")[q].blocks.shape == (4, 16, 16)
    assert made["oft-constrained"].each("rotation")[q].blocks.shape == (1, 16, 16)
    # Three factors make blocks of 4 four times as large.
    assert made["boft"].each("rotation")[q].blocks.shape == (4, 16, 16)
    assert made["hra"].rank == 4
    assert all(compiled.mergeable for compiled in made.values())
    for kind in ("oft-constrained", "boft"):
        for rotation in made[kind].each("rotation").values():
            square = rotation.blocks @ rotation.blocks.mT
            assert (square - torch.eye(square.shape[-1])).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["oft", "oft-constrained", "boft", "hra"])
def test_the_limit_on_bytes_counts_what_it_becomes(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path, kind: str
) -> None:
    folder = specimen(kind).save(tmp_path / "a")
    compiled = compile_folder(folder, spec)
    needed = compiled.compiled_bytes
    if kind == "hra":  # B has a module's outputs for its rows in the end
        shapes = [spec.linears[name] for name in compiled.each("low_rank")]
        needed = 4 * 4 * sum(shape.in_features + shape.out_features for shape in shapes)
    compile_folder(folder, spec, AdapterLimits(compiled_bytes=max(needed, compiled.compiled_bytes)))
    with pytest.raises(AdapterInvalid) as caught:
        compile_folder(folder, spec, AdapterLimits(compiled_bytes=needed - 1))
    assert all(f"over the limit of {needed - 1} " in problem for problem in caught.value.problems)


def test_a_small_file_of_a_huge_product_is_refused_before_it_is_computed(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    adapter = specimen("lokr")
    adapter.config.update(r=1, decompose_factor=1, target_modules=["model.layers.0.self_attn.q_proj"])
    adapter.tensors = {
        f"{Q0}.lokr_w1": torch.ones(1, 1),
        f"{Q0}.lokr_w2_a": torch.ones(64, 1),
        f"{Q0}.lokr_w2_b": torch.ones(1, 64),
    }
    folder = adapter.save(tmp_path / "a")
    assert compile_folder(folder, spec).compiled_bytes == 4 * (1 + 64 * 64)
    with pytest.raises(AdapterInvalid, match="over the limit of 16000 bytes"):
        compile_folder(folder, spec, AdapterLimits(compiled_bytes=16_000))


OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("lokr", {"r": 0}, "rank 0 with alpha 12"),
    ("lokr", {"alpha": "8"}, "alpha has the wrong type: '8'"),
    ("lokr", {"alpha": 1e300}, "the arithmetic makes weights of"),
    ("lokr", {"r": 3}, f"tensor {Q0}.lokr_w2_a is missing"),
    ("lokr", {"rank_pattern": {"*": 4}}, "rank_pattern is not a regular expression"),
    ("lokr", {"alpha_pattern": {"q_proj": None}}, "rank 20 with alpha None"),
    ("lokr", {"decompose_factor": 4}, f"tensor {Q0}.lokr_w1 has shape [8, 8], expected [4, 4]"),
    ("lokr", {"decompose_factor": "8"}, "decompose_factor has the wrong type: '8'"),
    ("lokr", {"decompose_both": 1}, "decompose_both has the wrong type: 1"),
    ("lokr-products", {"decompose_both": False}, f"tensor {Q0}.lokr_w1 is missing"),
    ("oft", {"r": 4}, "r 4 with oft_block_size 16 isn't valid"),
    ("oft", {"oft_block_size": 0}, "r 0 with oft_block_size 0 isn't valid"),
    ("oft", {"oft_block_size": -16}, "r 0 with oft_block_size -16 isn't valid"),
    ("oft", {"oft_block_size": -16, "r": 4}, "r 4 with oft_block_size -16 isn't valid"),
    ("oft", {"oft_block_size": None}, "oft_block_size is missing: it was saved before PEFT 0.14"),
    ("oft", {"oft_block_size": 8}, ".oft_R.weight has shape [4, 120], expected [8, 28]"),
    ("oft", {"block_share": True}, ".oft_R.weight has shape [4, 120], expected [1, 120]"),
    ("oft", {"block_share": 1}, "block_share has the wrong type: 1"),
    ("oft", {"eps": math.nan}, "eps nan isn't valid"),
    ("oft", {"eps": -1}, "eps -1 isn't valid"),
    ("oft", {"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms 0 isn't from 1 to 100"),
    ("oft", {"num_cayley_neumann_terms": 10**9}, "num_cayley_neumann_terms 1000000000 isn't from 1 to 100"),
    ("oft", {"num_cayley_neumann_terms": 2.5}, "num_cayley_neumann_terms has the wrong type: 2.5"),
    ("oft", {"peft_version": "0.17.1"}, "use_cayley_neumann means another matrix since PEFT 0.18.0"),
    ("oft", {"peft_version": "0.18.0.dev0@abc"}, "use_cayley_neumann means another matrix since PEFT 0.18.0"),
    ("oft", {"peft_version": None}, "and peft_version is ''; train it again with a newer one"),
    ("oft", {"peft_version": "new"}, "and peft_version is 'new'; train it again with a newer one"),
    ("oft", {"use_cayley_neumann": None, "peft_version": None}, "use_cayley_neumann means another matrix"),
    ("oft", {"bias": "oft"}, "bias 'oft' means nothing to PEFT"),
    ("boft", {"boft_block_num": 4}, "boft_block_size 4 with boft_block_num 4 and boft_n_butterfly_factor 3"),
    ("boft", {"boft_block_size": 0}, "boft_block_size 0 with boft_block_num 0"),
    ("boft", {"boft_n_butterfly_factor": 0}, "and boft_n_butterfly_factor 0 isn't valid"),
    ("boft", {"boft_n_butterfly_factor": 10**9}, "and boft_n_butterfly_factor 1000000000 isn't valid"),
    ("boft", {"boft_n_butterfly_factor": 6}, "the 64 inputs of model.layers.0.self_attn.q_proj can't be cut"),
    ("boft", {"boft_block_size": 5}, "the 64 inputs of model.layers.0.self_attn.q_proj can't be cut"),
    ("boft", {"boft_block_size": 0, "boft_block_num": 5}, "inputs of model.layers.0.self_attn.q_proj can't be cut"),
    ("boft", {"boft_block_size": 0, "boft_block_num": 500}, "inputs of model.layers.0.self_attn.q_proj can't be cut"),
    ("boft", {"boft_block_size": 1}, "blocks of 1 inputs of model.layers.0.self_attn.q_proj have no halves"),
    ("boft", {"boft_n_butterfly_factor": 2}, ".boft_R has shape [3, 16, 4, 4], expected [2, 16, 4, 4]"),
    ("boft", {"bias": "boft"}, "bias 'boft' means nothing to PEFT"),
    ("hra", {"r": 0}, "r 0 isn't valid"),
    ("hra", {"r": 5}, ".hra_u has shape [64, 4], expected [64, 5]"),
    ("hra", {"apply_GS": 1}, "apply_GS has the wrong type: 1"),
    ("hra", {"bias": "hra"}, "bias 'hra' means nothing to PEFT"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options", "expected"), OPTIONS, ids=[f"{kind}-{str(o)[:60]}" for kind, o, _ in OPTIONS]
)
def test_configurations_that_cant_be_served(
    check_refused: CheckRefused, kind: str, options: dict[str, Any], expected: str
) -> None:
    check_refused(kind, options, expected)


def test_cayleys_own_transform_is_served_whoever_saved_it(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    adapter = specimen("oft-constrained")
    adapter.config["peft_version"] = "0.17.0"
    compile_folder(adapter.save(tmp_path / "a"), spec)


@pytest.mark.parametrize(
    ("kind", "tensor", "value", "expected"),
    [
        (
            "oft",
            f"{Q0}.oft_R.weight",
            1e30,
            "the arithmetic makes weights of model.layers.0.self_attn.q_proj",
        ),
        ("boft", f"{Q0}.boft_R", 3e38, "the arithmetic makes weights of model.layers.0.self_attn.q_proj"),
        ("hra", f"{Q0}.hra_u", 0.0, "the arithmetic makes weights of model.layers.0.self_attn.q_proj"),
        (
            "hra-orthogonal",
            f"{Q0}.hra_u",
            1.0,
            "the vectors of model.layers.0.self_attn.q_proj depend on each",
        ),
    ],
)
def test_values_that_make_no_matrix(
    specimen: Callable[[str], Specimen],
    spec: BaseSpec,
    tmp_path: Path,
    kind: str,
    tensor: str,
    value: float,
    expected: str,
) -> None:
    adapter = specimen(kind)
    signs = torch.randn(adapter.tensors[tensor].shape, generator=torch.Generator().manual_seed(0)).sign()
    adapter.tensors[tensor] = value * (signs if value > 1 else torch.ones_like(signs))
    with pytest.raises(AdapterInvalid) as caught:
        compile_folder(adapter.save(tmp_path / "a"), spec)
    assert any(problem.startswith(expected) for problem in caught.value.problems), caught.value.problems
