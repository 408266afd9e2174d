"""Kinds that are folded into merged copies: the weights they make, and what can be wrong with them alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from polygraft.adapters.limits import AdapterLimits
from polygraft.core.primitives import OnTrainedBias
from polygraft.core.spec import BaseSpec
from polygraft.engine.check import check_against
from polygraft.errors import AdapterInvalid
from polygraft.layers.linear.merging import dense_weight
from tests.adapters.conftest import CheckRefused
from tests.adapters.specimen import Q0, Specimen, compile_folder
from tests.peft_folders import CAUSAL, MERGED_ONLY, TARGETS, save_adapter

ON_ALL: dict[str, Any] = {"target_modules": TARGETS["llama"], **CAUSAL}
CONFIGS: dict[str, peft.PeftConfig] = {
    "fourierft, whole names": peft.FourierFTConfig(
        n_frequency=9,
        n_frequency_pattern={"model.layers.0.self_attn.q_proj": 64 * 64, r"\d\.mlp\.down_proj": 1},
        random_loc_seed=3,
        **ON_ALL,
    ),
    "c3a, large blocks": peft.C3AConfig(block_size=32, **ON_ALL),
    "c3a, blocks of one": peft.C3AConfig(block_size=1, **ON_ALL),
    "shira": peft.ShiraConfig(r=5, **ON_ALL),
    "hira": peft.HiraConfig(r=2, layers_to_transform=[2], **ON_ALL),
    "miss-bat": peft.MissConfig(r=32, init_weights="bat", **ON_ALL),
    "waveft, as it is": peft.WaveFTConfig(n_frequency=40, use_idwt=False, **ON_ALL),
    "waveft, in proportion": peft.WaveFTConfig(n_frequency=40, proportional_parameters=True, **ON_ALL),
    "waveft, every frequency": peft.WaveFTConfig(
        n_frequency=10, n_frequency_pattern={"0.*q_proj": 64 * 64}, random_loc_seed=1, **ON_ALL
    ),
    "randlora, from its key": peft.RandLoraConfig(
        r=7, save_projection=False, projection_prng_key=2, **ON_ALL
    ),
    "randlora, sparse": peft.RandLoraConfig(r=16, save_projection=False, sparse=True, **ON_ALL),
    "randlora, very sparse": peft.RandLoraConfig(
        r=16, save_projection=False, very_sparse=True, target_modules="all-linear", **CAUSAL
    ),
    "super-tuning, the smallest": peft.SupertuningConfig(sparsity=0.5, select_top=False, **ON_ALL),
    "osf": peft.OSFConfig(effective_rank=0.3, rank_pattern={"v_proj": 31}, **ON_ALL),
    "frod": peft.FrodConfig(sparse_rate=0.2, progressbar=False, target_modules="all-linear", **CAUSAL),
    "frod, its diagonal alone": peft.FrodConfig(sparse_rate=0.0, progressbar=False, **ON_ALL),
    "road 2": peft.RoadConfig(variant="road_2", group_size=2, **ON_ALL),
}


def saved(folder: Path, base: Path, config: peft.PeftConfig) -> None:
    torch.manual_seed(3)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)


def check_against_pefts_merge(folder: Path, base: Path, spec: BaseSpec) -> None:
    """Weights, in one piece and in several, and biases are those of PEFT's own merge, to rounding."""
    compiled = compile_folder(folder, spec)
    assert compiled.merged_only
    assert compiled.mergeable
    assert (compiled.primitives, compiled.rank) == (
        ("dense", "replace")[: 1 + bool(compiled.each("bias"))],
        0,
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {}
    for name in compiled.each("dense"):
        module = model.get_submodule(name)
        bias = None if module.bias is None else module.bias.detach().clone()
        before[name] = dense_weight(module).clone(), bias
    merged: Any = peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    for name, change in compiled.each("dense").items():
        weight, bias = before[name]
        after = merged.get_submodule(name)
        expected = after.weight.detach().T if isinstance(after, Conv1D) else after.weight.detach()
        moved = (expected - weight).abs().max()
        assert moved > 2e-4
        # OSF's singular vectors are float32's in PEFT.
        least = 1e-5 if compiled.kind == "osf" else 3e-6
        tolerance = {"rtol": 1e-5, "atol": least * max(1.0, float(moved))}
        trained = compiled.each("bias").get(name)
        own = bias if trained is None else trained.float()
        assert change.completed(weight, own) is change or change.needs_base
        change = change.completed(weight, own)
        assert not change.needs_base
        torch.testing.assert_close(change.fold(weight.clone(), 0), expected, **tolerance)
        step = math.lcm(16, change.span)
        pieces = [change.fold(weight[at : at + step].clone(), at) for at in range(0, len(weight), step)]
        torch.testing.assert_close(torch.cat(pieces), expected, **tolerance)
        change = change if trained is None else OnTrainedBias(change, trained)
        got = change.fold_bias(bias)
        assert (got is None) == (after.bias is None)
        if got is not None:
            torch.testing.assert_close(got, after.bias.detach(), **tolerance)


@pytest.mark.parametrize("which", CONFIGS)
def test_it_makes_the_weights_that_peft_makes(
    llama: Path, spec: BaseSpec, tmp_path: Path, which: str
) -> None:
    saved(tmp_path / "a", llama, CONFIGS[which])
    check_against_pefts_merge(tmp_path / "a", llama, spec)


@pytest.mark.parametrize("kind", MERGED_ONLY)
@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_biases_and_conv1d(
    tiny_model: Callable[[str], Path],
    specs: Callable[[str], BaseSpec],
    tmp_path: Path,
    architecture: str,
    kind: str,
) -> None:
    if architecture == "gpt2" and kind in ("fourierft", "waveft"):
        pytest.skip("PEFT's merge of it isn't made for Conv1D: the matrix holds it against PEFT's forward")
    save_adapter(tmp_path / "a", tiny_model(architecture), architecture, kind)
    check_against_pefts_merge(tmp_path / "a", tiny_model(architecture), specs(architecture))


def test_what_modules_share_is_counted_and_copied_once(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    adapter = specimen("randlora")
    folder = adapter.save(tmp_path / "a")
    compiled = compile_folder(folder, spec)
    # Beside them PEFT saves a copy for every module.
    once = {
        name: t
        for name, t in adapter.tensors.items()
        if "randlora_A" not in name and "randlora_B" not in name
    }
    once |= {name: adapter.tensors[name] for name in ("base_model.randlora_A", "base_model.randlora_B")}
    assert compiled.compiled_bytes == 4 * sum(t.numel() for t in once.values()) < 4 * compiled.parameters
    assert compiled.without_layer_weights().compiled_bytes == compiled.compiled_bytes
    assert all(tensor.device.type == "meta" for tensor in compiled.without_layer_weights().tensors())


def test_a_copy_of_what_modules_share_that_is_none(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    damaged = specimen("randlora")
    damaged.tensors[f"{Q0}.randlora_A"] += 1
    with pytest.raises(AdapterInvalid) as caught:
        compile_folder(damaged.save(tmp_path / "a"), spec)
    assert caught.value.problems == (
        f"tensor {Q0}.randlora_A isn't base_model.randlora_A, which it is a copy of",
    )


def test_checking_a_folder_tells_how_it_would_be_served(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    for kind, merged_only in (("fourierft", True), ("lora", False)):
        report = check_against(specimen(kind).save(tmp_path / kind), spec, AdapterLimits())
        assert (report.fits, report.merged_only, report.modules) == (True, merged_only, 9)


NO_DIVISOR = "model.layers.0.self_attn.q_proj's 64 inputs and 64 outputs"
OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("fourierft", {"n_frequency_pattern": {"q_proj": 0}}, "n_frequency 0 for model.layers.0.self_attn.q_proj"),
    ("fourierft", {"n_frequency_pattern": {"q_proj": 4097}}, "n_frequency 4097 for"),
    ("fourierft", {"n_frequency_pattern": {"(": 4}}, "n_frequency_pattern is not a regular expression"),
    ("fourierft", {"n_frequency": "9"}, "n_frequency has the wrong type: '9'"),
    ("fourierft", {"scaling": math.nan}, "scaling nan with random_loc_seed 777 isn't valid"),
    ("fourierft", {"random_loc_seed": 2**64}, "isn't valid"),
    ("fourierft", {"bias": "fourier"}, "bias 'fourier' means nothing to PEFT"),
    ("c3a", {"block_size_pattern": {"q_proj": 24}}, f"block_size 24 doesn't divide {NO_DIVISOR}"),
    ("c3a", {"block_size_pattern": {"q_proj": 0}}, f"block_size 0 doesn't divide {NO_DIVISOR}"),
    ("c3a", {"block_size_pattern": {"q_proj": "8"}}, "block_size '8' doesn't divide"),
    ("c3a", {"block_size_pattern": {"(": 4}}, "block_size_pattern is not a regular expression"),
    ("c3a", {"bias": "c3a"}, "bias 'c3a' means nothing to PEFT"),
    ("shira", {"r": 0}, "r 0 isn't valid"),
    ("shira", {"r": 2}, f"tensor {Q0}.shira_weight has shape [384], expected [256]"),
    ("miss-bat", {"r": 24}, f"r 24 with mini_r 1 doesn't fit {NO_DIVISOR}"),
    ("miss-bat", {"init_weights": True}, f"tensor {Q0}.miss_block has shape [8, 8, 8], expected [8, 64]"),
    ("waveft", {"wavelet_family": "sym4"}, "wavelet_family 'sym4' isn't served: its filters"),
    ("waveft", {"n_frequency_pattern": {"q_proj": None}}, "n_frequency None for"),
    ("waveft", {"n_frequency_pattern": {"(": 4}}, "n_frequency_pattern is not a regular expression"),
    ("waveft", {"scaling": math.inf}, "scaling inf with"),
    ("waveft", {"proportional_parameters": True}, f"tensor {Q0}.waveft_spectrum has shape [90], expected ["),
    ("randlora", {"r": 0}, "r 0 with randlora_alpha 20 isn't valid"),
    ("randlora", {"randlora_alpha": math.nan}, "alpha nan isn't valid"),
    ("randlora", {"projection_prng_key": 2**64}, "isn't a number of 64 bits"),
    ("randlora", {"save_projection": False}, "tensor base_model.randlora_A isn't expected"),
    ("randlora", {"r": 9}, "tensor base_model.randlora_A has shape [10, 1, 64], expected [9, 1, 64]"),
    ("supra", {"r": None}, f"tensor {Q0}.supertuning_lora_A.weight isn't expected"),
    ("supra", {"r": 0}, "with r 0 and lora_alpha 5 isn't valid"),
    ("supra", {"lora_alpha": math.nan}, "lora_alpha nan isn't valid"),
    ("supertuning", {"sparsity": 1.0}, "sparsity 1.0 with r None and lora_alpha 0 isn't valid"),
    ("supertuning", {"sparsity": 0.8}, f"tensor {Q0}.supertuning_values has shape [409], expected [819]"),
    ("supertuning", {"save_precomputed_indices": False}, "which elements it changes isn't in the file"),
    ("road", {"variant": "road_3"}, "variant 'road_3' with group_size 16 isn't valid"),
    ("road", {"group_size": 7}, "group_size 7 isn't valid"),
    ("road", {"group_size": 0}, "group_size 0 isn't valid"),
    ("road", {"group_size": 48}, "group_size 48 doesn't divide model.layers.0.self_attn.q_proj's 64 outputs"),
    ("road", {"variant": "road_2"}, f"tensor {Q0}.road_theta has shape [32], expected [64]"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options", "expected"), OPTIONS, ids=[f"{kind}-{str(o)[:60]}" for kind, o, _ in OPTIONS]
)
def test_configurations_that_cant_be_served(
    check_refused: CheckRefused, kind: str, options: dict[str, Any], expected: str
) -> None:
    check_refused(kind, options, expected)


def test_biases_of_norms_cant_be_merged(
    tiny_model: Callable[[str], Path], specs: Callable[[str], BaseSpec], tmp_path: Path
) -> None:
    config = peft.C3AConfig(block_size=32, bias="all", target_modules=["lm_head"], **CAUSAL)
    folder = save_adapter(tmp_path / "a", tiny_model("gpt2"), "gpt2", config)
    with pytest.raises(AdapterInvalid) as caught:
        compile_folder(folder, specs("gpt2"))
    assert caught.value.problems == ("c3a is served merged only, and norms of its own can't be merged",)


def test_elements_outside_a_module(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    # v_proj has fewer outputs than inputs.
    name = Q0.replace("q_proj", "v_proj") + ".shira_indices"
    damaged = specimen("shira")
    damaged.tensors[name][0, 0] = 40
    with pytest.raises(AdapterInvalid, match=r"holds an index that isn't in \[32, 64\]"):
        compile_folder(damaged.save(tmp_path / "a"), spec)
