"""AdaLoRA, LoHa and VeRA: what they compile to, what it costs, and what can be wrong with them alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from polygraft.adapters.limits import AdapterLimits
from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.spec import BaseSpec
from polygraft.errors import AdapterInvalid
from tests.adapters.conftest import CheckRefused
from tests.adapters.specimen import Q0, Specimen, compile_folder
from tests.peft_folders import CAUSAL, TARGETS

Q = "model.layers.0.self_attn.q_proj"


def deltas(compiled: AdapterWeights) -> dict[str, torch.Tensor]:
    """What each module's weights gain."""
    return {name: low_rank.product for name, low_rank in compiled.each("low_rank").items()}


def saved(folder: Path, base: Path, config: peft.PeftConfig) -> dict[str, torch.Tensor]:
    """Save a random adapter as it is before its training ends; returns what PEFT adds to each module."""
    torch.manual_seed(3)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folder)
    )
    layers = loaded.base_model.model.named_modules()
    return {name: m.get_delta_weight("default") for name, m in layers if hasattr(m, "get_delta_weight")}


ALL = TARGETS["llama"]
CONFIGS: dict[str, peft.PeftConfig] = {
    "before pruning": peft.AdaLoraConfig(
        init_r=3, lora_alpha=5, total_step=9, target_modules=ALL, exclude_modules=["v_proj"], **CAUSAL
    ),
    "alpha 0": peft.AdaLoraConfig(init_r=3, lora_alpha=0, total_step=9, target_modules=ALL, **CAUSAL),
    "loha": peft.LoHaConfig(
        r=2,
        alpha=3,
        target_modules=ALL,
        rank_pattern={r"1\..*down_proj": 4},
        alpha_pattern={"q_proj": 7},
        rank_dropout=0.5,
        module_dropout=0.5,
        use_effective_conv2d=True,
        layers_to_transform=[1, 2],
        **CAUSAL,
    ),
    "vera, saved": peft.VeraConfig(r=8, target_modules=ALL, d_initial=0.5, vera_dropout=0.5, **CAUSAL),
    "vera, from its key": peft.VeraConfig(
        r=8, target_modules=["q_proj", "v_proj"], save_projection=False, projection_prng_key=123, **CAUSAL
    ),
    "vera, all linear": peft.VeraConfig(
        r=8, target_modules="all-linear", save_projection=False, projection_prng_key=-1, **CAUSAL
    ),
}


@pytest.mark.parametrize("which", CONFIGS)
def test_it_adds_what_peft_adds(llama: Path, spec: BaseSpec, tmp_path: Path, which: str) -> None:
    expected = saved(tmp_path / "a", llama, CONFIGS[which])
    found = deltas(compile_folder(tmp_path / "a", spec))
    assert sorted(found) == sorted(expected)
    for name, delta in found.items():
        assert expected[name].abs().max() > 0.01
        torch.testing.assert_close(delta, expected[name], rtol=1e-5, atol=1e-6)


def test_adalora_modules_of_rank_zero_cost_nothing(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    adapter = specimen("adalora")
    masks = {name.removesuffix(".lora_E"): sum(mask) for name, mask in adapter.config["rank_pattern"].items()}
    compiled = compile_folder(adapter.save(tmp_path / "a"), spec)
    assert 0 in masks.values()
    assert {name: w.rank for name, w in compiled.each("low_rank").items()} == {
        m: r for m, r in masks.items() if r
    }
    assert compiled.rank == max(masks.values()) < adapter.config["init_r"]
    # lora_E is folded into A.
    sizes = {name: spec.linears[name].in_features + spec.linears[name].out_features for name in masks}
    assert compiled.compiled_bytes == 4 * sum(rank * sizes[name] for name, rank in masks.items())


@pytest.mark.parametrize(("kind", "rank", "modules"), [("loha", 9, 9), ("vera", 16, 9)], ids=["loha", "vera"])
def test_the_compiled_rank_is_what_counts(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path, kind: str, rank: int, modules: int
) -> None:
    folder = specimen(kind).save(tmp_path / "a")
    compiled = compile_folder(folder, spec)
    assert (compiled.rank, len(compiled.each("low_rank")), compiled.mergeable) == (rank, modules, True)
    assert compiled.compiled_bytes > 4 * compiled.parameters
    compile_folder(folder, spec, AdapterLimits(rank=rank, compiled_bytes=compiled.compiled_bytes))
    for limits, problem in (
        (AdapterLimits(rank=rank - 1), f"rank {rank} is over the limit of {rank - 1} (--max-adapter-rank)"),
        (
            AdapterLimits(compiled_bytes=compiled.compiled_bytes - 1),
            f"compiled it is over the limit of {compiled.compiled_bytes - 1} bytes (--max-adapter-bytes)",
        ),
    ):
        with pytest.raises(AdapterInvalid) as caught:
            compile_folder(folder, spec, limits)
        assert caught.value.problems == (problem,)


@pytest.mark.parametrize("kind", ["loha", "vera"])
def test_a_small_file_with_a_huge_rank_is_refused_before_it_is_computed(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path, kind: str
) -> None:
    rank = 40_000  # LoHa's would be 1.6 billion
    adapter = specimen(kind)
    adapter.config.update(r=rank, rank_pattern={}, target_modules=[Q])
    if kind == "vera":
        adapter.tensors = {f"{Q0}.vera_lambda_b": torch.zeros(64), f"{Q0}.vera_lambda_d": torch.zeros(rank)}
    else:
        columns, rows = torch.zeros(64, rank), torch.zeros(rank, 64)
        adapter.tensors = {f"{Q0}.hada_w{n}_a": columns.clone() for n in (1, 2)}
        adapter.tensors |= {f"{Q0}.hada_w{n}_b": rows.clone() for n in (1, 2)}
    with pytest.raises(AdapterInvalid, match="is over the limit of 256"):
        compile_folder(adapter.save(tmp_path / "a"), spec)


@pytest.mark.parametrize("kind", ["adalora", "loha", "vera"])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("asked", [None, torch.bfloat16])
def test_what_is_computed_is_rounded_once(
    specimen: Callable[[str], Specimen],
    spec: BaseSpec,
    tmp_path: Path,
    kind: str,
    stored: torch.dtype,
    asked: torch.dtype | None,
) -> None:
    adapter = specimen(kind)
    adapter.tensors = {name: t.to(stored) for name, t in adapter.tensors.items()}
    compiled = compile_folder(adapter.save(tmp_path / "a"), spec, AdapterLimits(dtype=asked))
    adapter.tensors = {name: t.float() for name, t in adapter.tensors.items()}
    wide = compile_folder(adapter.save(tmp_path / "b"), spec)
    for name, low_rank in compiled.each("low_rank").items():
        assert torch.equal(low_rank.a, wide.each("low_rank")[name].a.to(asked or torch.float32))
        assert torch.equal(low_rank.b, wide.each("low_rank")[name].b.to(asked or torch.float32))


MASKS = "rank_pattern of model.layers.0.self_attn.q_proj.lora_E isn't a list of 6 booleans"
OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("adalora", {"init_r": 0}, "init_r 0 with lora_alpha 8 isn't valid"),
    ("adalora", {"init_r": "6"}, "init_r has the wrong type: '6'"),
    ("adalora", {"lora_alpha": float("nan")}, "init_r 6 with lora_alpha nan isn't valid"),
    ("adalora", {"lora_alpha": 1e300}, "the arithmetic makes weights of"),
    ("adalora", {"use_rslora": True}, "use_rslora=True isn't served: this kind has no rank-stabilized scaling"),
    ("adalora", {"alpha_pattern": {"q_proj": 2}}, "alpha_pattern={'q_proj': 2} isn't served: this kind has one"),
    ("adalora", {"lora_bias": True}, "lora_bias=True isn't served"),
    ("adalora", {"use_dora": True}, "use_dora=True isn't served"),
    ("adalora", {"bias": "some"}, "bias 'some' means nothing to PEFT"),
    ("adalora", {"rank_pattern": []}, "rank_pattern has the wrong type: []"),
    ("adalora", {"rank_pattern": {f"{Q}.lora_E": [True] * 5}}, MASKS),
    ("adalora", {"rank_pattern": {f"{Q}.lora_E": [1] * 6}}, MASKS),
    ("adalora", {"rank_pattern": {f"{Q}.lora_E": 6}}, MASKS),
    ("adalora", {"rank_pattern": {"q_proj": 6}}, "rank_pattern has 'q_proj', which is no targeted module's lora_E"),
    ("loha", {"r": 0, "rank_pattern": {}}, "rank 0 with alpha 5"),
    ("loha", {"alpha": "8"}, "alpha has the wrong type: '8'"),
    ("loha", {"alpha": 1e300}, "the arithmetic makes weights of"),
    ("loha", {"rank_pattern": {"*": 4}}, "rank_pattern is not a regular expression"),
    ("loha", {"alpha_pattern": {"q_proj": None}}, "rank 2 with alpha None"),
    ("vera", {"r": 0}, "r 0 isn't valid"),
    ("vera", {"r": 15}, f"tensor {Q0}.vera_lambda_d has shape [16], expected [15]"),
    ("vera", {"bias": "some"}, "bias 'some' means nothing to PEFT"),
    ("vera", {"save_projection": 1}, "save_projection has the wrong type: 1"),
    ("vera", {"save_projection": True}, "tensor base_model.vera_A is missing"),
    ("vera", {"projection_prng_key": 2**64}, "isn't a number of 64 bits"),
    ("vera", {"projection_prng_key": "7"}, "projection_prng_key has the wrong type: '7'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options", "expected"), OPTIONS, ids=[f"{kind}-{str(o)[:60]}" for kind, o, _ in OPTIONS]
)
def test_configurations_that_cant_be_served(
    check_refused: CheckRefused, kind: str, options: dict[str, Any], expected: str
) -> None:
    check_refused(kind, options, expected)


def test_projections_that_the_configuration_says_arent_saved(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    # PEFT would pass over them and take others.
    adapter = specimen("vera")
    adapter.tensors["base_model.vera_A"] = torch.zeros(16, 128)
    with pytest.raises(AdapterInvalid) as caught:
        compile_folder(adapter.save(tmp_path / "a"), spec)
    assert caught.value.problems == ("tensor base_model.vera_A isn't expected",)
