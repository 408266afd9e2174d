"""Kinds whose low-rank weights are put together from fewer numbers: what they compile to, and what can be wrong
with them alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from polygraft.adapters.limits import AdapterLimits
from polygraft.core.spec import BaseSpec
from polygraft.errors import AdapterInvalid
from tests.adapters.conftest import CheckRefused
from tests.adapters.peft.test_low_rank_kinds import ALL, deltas, saved
from tests.adapters.specimen import Q0, Specimen, compile_folder, split
from tests.peft_folders import CAUSAL

ON_ALL: dict[str, Any] = {"target_modules": ALL, **CAUSAL}
CONFIGS: dict[str, peft.PeftConfig] = {
    "delora": peft.DeloraConfig(r=3, rank_pattern={"q_proj": 5}, lambda_pattern={"q_proj": 2}, **ON_ALL),
    "gralora, one block": peft.GraloraConfig(r=3, gralora_k=1, **ON_ALL),
    "gralora, as many blocks as ranks": peft.GraloraConfig(r=8, gralora_k=8, alpha=3, **ON_ALL),
    "gralora, hybrid": peft.GraloraConfig(r=4, gralora_k=2, hybrid_r=1, **ON_ALL),
    "pvera, from its key": peft.PveraConfig(r=8, save_projection=False, projection_prng_key=5, **ON_ALL),
    "pvera, a seed for training": peft.PveraConfig(r=8, generator_seed=5, **ON_ALL),
    "unilora, all linear": peft.UniLoraConfig(r=2, target_modules="all-linear", proj_seed=1, **CAUSAL),
    "unilora, more numbers than elements": peft.UniLoraConfig(
        r=1, theta_d_length=5000, layers_to_transform=[1], **ON_ALL
    ),
    "vblora, one vector": peft.VBLoRAConfig(r=2, num_vectors=9, vector_length=8, topk=1, **ON_ALL),
    "vblora, one vector alone": peft.VBLoRAConfig(
        r=2, num_vectors=9, vector_length=8, topk=1, save_only_topk_weights=True, **ON_ALL
    ),
    "vblora, all vectors": peft.VBLoRAConfig(r=2, num_vectors=5, vector_length=8, topk=5, **ON_ALL),
    "tinylora, one vector for all": peft.TinyLoraConfig(r=2, u=3, weight_tying=1.0, **ON_ALL),
    "tinylora, a rank over the module's": peft.TinyLoraConfig(r=90, u=3, **ON_ALL),
    "tinylora, from its seed": peft.TinyLoraConfig(
        r=3, u=3, weight_tying=0.5, save_projection=False, target_modules="all-linear", **CAUSAL
    ),
}


@pytest.mark.parametrize("which", CONFIGS)
def test_it_adds_what_peft_adds(llama: Path, spec: BaseSpec, tmp_path: Path, which: str) -> None:
    expected = saved(tmp_path / "a", llama, CONFIGS[which])
    found = deltas(compile_folder(tmp_path / "a", spec))
    assert sorted(found) == sorted(expected)
    for name, delta in found.items():
        largest = float(expected[name].abs().max())
        assert largest > 5e-5
        torch.testing.assert_close(delta, expected[name], rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize(
    "config",
    [
        peft.PolyConfig(r=3, n_skills=5, n_splits=2, n_tasks=3, **ON_ALL),
        peft.PolyConfig(r=2, n_skills=1, target_modules="all-linear", **CAUSAL),
    ],
    ids=["several tasks", "one skill"],
)
def test_a_task_of_poly_is_a_lora(
    llama: Path, spec: BaseSpec, tmp_path: Path, config: peft.PolyConfig
) -> None:
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(tmp_path / "all")
    split(tmp_path / "all")
    for task in range(config.n_tasks):
        compiled = compile_folder(tmp_path / f"all-{task}", spec)
        assert compiled.rank == config.r
        for name, delta in deltas(compiled).items():
            layer = model.base_model.model.get_submodule(name)
            x = torch.eye(layer.in_features)[None]
            with torch.no_grad():
                expected = (layer(x, task_ids=torch.tensor([task])) - layer.base_layer(x))[0].T
            torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 5, 64])
def test_miss_adds_up_pieces_of_the_input(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path, rank: int
) -> None:
    adapter = specimen("miss")
    adapter.config.update(r=rank, target_modules=["model.layers.0.self_attn.q_proj"])
    block = torch.randn(rank, 64, generator=torch.Generator().manual_seed(0))
    adapter.tensors = {f"{Q0}.miss_block": block}
    (delta,) = deltas(compile_folder(adapter.save(tmp_path / "a"), spec)).values()
    assert torch.equal(delta, torch.stack([block[at % rank] for at in range(64)], 1))


def test_a_bias_alone_has_no_rank(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    adapter = specimen("beft")
    compiled = compile_folder(adapter.save(tmp_path / "a"), spec)
    assert (compiled.rank, compiled.num_modules, compiled.mergeable) == (0, 9, True)
    bias = compiled.each("low_rank")["model.layers.0.self_attn.q_proj"].bias
    assert bias is not None
    assert torch.equal(bias, adapter.tensors[f"{Q0}.beft_bias"][0])


@pytest.mark.parametrize(
    ("kind", "rank"),
    [("gralora", 12), ("gralora-hybrid", 19), ("pvera", 16), ("miss", 6), ("unilora", 4)],
)
def test_the_compiled_rank_and_bytes_are_what_counts(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path, kind: str, rank: int
) -> None:
    folder = specimen(kind).save(tmp_path / "a")
    compiled = compile_folder(folder, spec)
    assert (compiled.rank, len(compiled.each("low_rank"))) == (rank, 9)
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
        assert problem in caught.value.problems


@pytest.mark.parametrize("kind", ["delora", "gralora", "miss-mini", "pvera", "unilora", "vblora", "tinylora"])
@pytest.mark.parametrize("asked", [None, torch.bfloat16])
def test_what_is_computed_is_rounded_once(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path, kind: str, asked: torch.dtype | None
) -> None:
    adapter = specimen(kind)
    adapter.tensors = {name: t.bfloat16() for name, t in adapter.tensors.items()}
    compiled = compile_folder(adapter.save(tmp_path / "a"), spec, AdapterLimits(dtype=asked))
    adapter.tensors = {name: t.float() for name, t in adapter.tensors.items()}
    wide = compile_folder(adapter.save(tmp_path / "b"), spec)
    for name, low_rank in compiled.each("low_rank").items():
        assert torch.equal(low_rank.a, wide.each("low_rank")[name].a.to(asked or torch.float32))
        assert torch.equal(low_rank.b, wide.each("low_rank")[name].b.to(asked or torch.float32))


NO_DIVISOR = "model.layers.0.self_attn.q_proj's 64 inputs and 64 outputs"
OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("delora", {"r": 0, "rank_pattern": {}}, "rank 0 with alpha 1"),
    ("delora", {"rank_pattern": {"*": 4}}, "rank_pattern is not a regular expression"),
    ("delora", {"bias": "delora"}, "bias 'delora' means nothing to PEFT"),
    ("gralora", {"r": 7}, "r 7 with gralora_k 2, hybrid_r 0 and alpha 9 isn't valid"),
    ("gralora", {"gralora_k": 0}, "r 6 with gralora_k 0"),
    ("gralora", {"gralora_k": "2"}, "gralora_k has the wrong type: '2'"),
    ("gralora", {"alpha": float("inf")}, "alpha inf isn't valid"),
    ("gralora", {"alpha": 1e300}, "the arithmetic makes weights of"),
    ("gralora", {"hybrid_r": -1}, "hybrid_r -1 and alpha 9 isn't valid"),
    ("gralora", {"r": 6, "gralora_k": 3}, f"gralora_k 3 doesn't divide {NO_DIVISOR}"),
    ("gralora", {"hybrid_r": 2}, f"tensor {Q0}.gralora_A_general.weight is missing"),
    ("gralora-hybrid", {"hybrid_r": 0}, f"tensor {Q0}.gralora_A_general.weight isn't expected"),
    ("miss", {"init_weights": "bat"}, "r 6 with mini_r 1 doesn't fit model.layers.0.self_attn.q_proj's 64 inputs"),
    ("miss", {"init_weights": "balance"}, "init_weights 'balance' isn't one of PEFT's variants"),
    ("miss", {"r": 65}, f"r 65 with mini_r 1 doesn't fit {NO_DIVISOR}"),
    ("miss", {"r": -1}, "r -1 with mini_r 1 isn't valid"),
    ("miss", {"init_weights": "mini"}, f"tensor {Q0}.miss_block has shape [6, 64], expected [6, 1]"),
    ("miss-mini", {"mini_r": 7}, f"r 4 with mini_r 7 doesn't fit {NO_DIVISOR}"),
    ("miss-mini", {"mini_r": 0}, "r 4 with mini_r 0 isn't valid"),
    ("pvera", {"sample_at_inference": True}, "sample_at_inference=True isn't served: it adds noise of its own"),
    ("pvera", {"r": 15}, "tensor base_model.pvera_A has shape [32, 128], expected [30, 128]"),
    ("pvera", {"save_projection": False}, "tensor base_model.pvera_A isn't expected"),
    ("unilora", {"r": 0}, "r 0 with theta_d_length 99 and proj_seed 42 isn't valid"),
    ("unilora", {"proj_seed": -1}, "proj_seed -1 isn't valid"),
    ("unilora", {"theta_d_length": 98}, "tensor base_model.unilora_theta_d has shape [99], expected [98]"),
    ("unilora", {"save_indices": True}, f"tensor {Q0}.unilora_indices_A is missing"),
    ("unilora", {"r": 40_000}, "rank 40000 is over the limit of 256"),
    ("unilora-indices", {"save_indices": False}, f"tensor {Q0}.unilora_indices_A isn't expected"),
    ("poly", {"r": 0}, "r 0 with n_tasks 1, n_skills 3, n_splits 1 and poly_type 'poly' isn't valid"),
    ("poly", {"n_tasks": 0}, "n_tasks 0, n_skills"),
    ("poly", {"n_tasks": 2}, "it holds 2 tasks, and an adapter is one; make a folder for each task t"),
    ("poly", {"n_skills": 4}, f"tensor {Q0}.poly_router.module_logits has shape [1, 3], expected [1, 4]"),
    ("poly", {"n_splits": 5}, f"n_splits 5 doesn't divide {NO_DIVISOR}"),
    ("poly", {"n_splits": 3, "n_skills": 1}, f"n_splits 3 doesn't divide {NO_DIVISOR}"),
    ("poly", {"poly_type": "mhr"}, "poly_type 'mhr' isn't valid"),
    ("poly-heads", {"n_splits": 2, "n_skills": 4}, f"tensor {Q0}.poly_lora_A has shape [4, 2, 16, 3], expected [2, 4"),
    ("vblora", {"topk": 21}, "r 4 with num_vectors 20, vector_length 16 and topk 21 isn't valid"),
    ("vblora", {"topk": 0}, "topk 0 isn't valid"),
    ("vblora", {"vector_length": 24}, f"vector_length 24 doesn't divide {NO_DIVISOR}"),
    ("vblora", {"save_only_topk_weights": True}, f"tensor {Q0}.vblora_logits_A_topk_indices is missing"),
    ("vblora-topk", {"topk": 2}, f"tensor {Q0}.vblora_logits_A_topk_indices has shape [3, 2, 3], expected [3, 2, 2]"),
    ("tinylora", {"u": 0}, "r 3 with u 0 and weight_tying 0.6 isn't valid"),
    ("tinylora", {"weight_tying": 1.5}, "weight_tying 1.5 isn't valid"),
    ("tinylora", {"weight_tying": float("nan")}, "weight_tying nan isn't valid"),
    ("tinylora", {"weight_tying": 0.0}, "tensor base_model.tinylora_v.4 is missing"),
    ("tinylora", {"weight_tying": 1.0}, "tensor base_model.tinylora_v.1 isn't expected"),
    ("tinylora", {"projection_seed": 2**64}, "isn't a number of 64 bits"),
    ("tinylora", {"save_projection": False}, f"tensor {Q0}.tinylora_P isn't expected"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options", "expected"), OPTIONS, ids=[f"{kind}-{str(o)[:60]}" for kind, o, _ in OPTIONS]
)
def test_configurations_that_cant_be_served(
    check_refused: CheckRefused, kind: str, options: dict[str, Any], expected: str
) -> None:
    check_refused(kind, options, expected)


@pytest.mark.parametrize(
    ("tensor", "place", "value", "expected"),
    [
        ("topk_indices", -1, 300, "holds an index that isn't in [0, 300)"),
        ("topk_indices", -1, -1, "holds an index that isn't in [0, 300)"),
        ("topk_indices", -1, None, "holds an index twice"),
        ("topk_weights", -1, -0.5, "holds weights that don't add up to one"),
        ("topk_weights", -1, 1.5, "holds weights that don't add up to one"),
    ],
)
def test_mixtures_of_vectors_that_are_none(
    specimen: Callable[[str], Specimen],
    spec: BaseSpec,
    tmp_path: Path,
    tensor: str,
    place: int,
    value: float | None,
    expected: str,
) -> None:
    damaged = specimen("vblora-topk")
    flat = damaged.tensors[f"{Q0}.vblora_logits_B_{tensor}"].view(-1)
    flat[place] = flat[place - 1] if value is None else value
    with pytest.raises(AdapterInvalid) as caught:
        compile_folder(damaged.save(tmp_path / "a"), spec)
    assert caught.value.problems == (f"tensor {Q0}.vblora_logits_B_{tensor} {expected}",)
