"""Fail closed: every class of damage in a PEFT folder is refused, and the text names the culprit."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polygraft.adapters.limits import AdapterLimits
from polygraft.base.loader import inspect_without_weights
from polygraft.core.primitives import Prefix, SoftPrompt
from polygraft.core.spec import BaseSpec
from polygraft.errors import AdapterInvalid
from tests.adapters.conftest import CheckRefused
from tests.adapters.specimen import Q0, Specimen, compile_folder

Change = Callable[[Specimen], None]
A, B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
EMBEDDINGS = "prompt_embeddings"


def refusals(
    specimen: Specimen, base: BaseSpec, folder: Path, limits: AdapterLimits | None = None
) -> tuple[str, ...]:
    with pytest.raises(AdapterInvalid) as caught:
        compile_folder(specimen.save(folder / "damaged"), base, limits)
    assert caught.value.name == "damaged"
    assert len(str(caught.value)) < 10_000
    return caught.value.problems


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def apply(specimen: Specimen) -> None:
        specimen.tensors[name] = change(specimen.tensors[name]).contiguous()

    return apply


def poked(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(t: torch.Tensor) -> torch.Tensor:
        t.view(-1)[-1] = value
        return t

    return apply


def without(name: str) -> Change:
    return lambda specimen: specimen.tensors.__delitem__(name)


def extra(name: str) -> Change:
    return lambda specimen: specimen.tensors.__setitem__(name, torch.zeros(2))


def option(**values: Any) -> Change:
    return lambda specimen: specimen.config.update(values)


TENSORS: list[tuple[str, str, Change, list[str]]] = [
    ("lora", "NaN", tensor(A, poked(math.nan)), [f"tensor {A} holds NaN or infinity"]),
    ("lora", "inf", tensor(B, poked(-math.inf)), [f"tensor {B} holds NaN or infinity"]),
    ("lora", "missing", without(A), [f"tensor {A} is missing"]),
    ("lora", "extra", extra("surplus.weight"), ["tensor surplus.weight isn't expected"]),
    ("lora", "shape", tensor(A, lambda t: t[:, 1:]), [f"tensor {A} has shape [4, 63], expected [4, 64]"]),
    ("lora", "transposed", tensor(A, torch.t), [f"tensor {A} has shape [64, 4], expected [4, 64]"]),
    ("lora", "dimensions", tensor(A, lambda t: t[None]), [f"tensor {A} has shape [1, 4, 64], expected [4, 64]"]),
    ("lora", "rank", tensor(B, lambda t: t[:, :3]), [f"tensor {B} has shape [64, 3], expected [64, 4]"]),
    ("lora", "int", tensor(A, torch.Tensor.int), [f"tensor {A} has type torch.int32"]),
    ("lora", "float64", tensor(A, torch.Tensor.double), [f"tensor {A} has type torch.float64"]),
    ("lora", "complex", tensor(A, lambda t: t.to(torch.complex64)), [f"tensor {A} has type torch.complex64"]),
    ("lora", "empty", tensor(A, lambda t: t[:0]), [f"tensor {A} has shape [0, 64], expected [4, 64]"]),
    ("lora", "bias unasked", extra(f"{Q0}.lora_B.bias"), [f"tensor {Q0}.lora_B.bias isn't expected"]),
    ("lora-bias", "bias missing", without(f"{Q0}.lora_B.bias"), [f"tensor {Q0}.lora_B.bias is missing"]),
    ("lora-bias", "bias shape", tensor(f"{Q0}.lora_B.bias", lambda t: t[1:]),
     [f"tensor {Q0}.lora_B.bias has shape [63], expected [64]"]),
    ("lora", "dora", extra(f"{Q0}.lora_magnitude_vector"),
     [f"tensor {Q0}.lora_magnitude_vector isn't expected"]),
    ("lora", "base layer", lambda s: s.tensors.update({f"{Q0}.base_layer.weight": torch.zeros(64, 64)}),
     [f"tensor {Q0}.base_layer.weight isn't expected"]),
    ("prefix", "NaN", tensor(EMBEDDINGS, poked(math.nan)), [f"tensor {EMBEDDINGS} holds NaN"]),
    ("prefix", "missing", without(EMBEDDINGS), [f"tensor {EMBEDDINGS} is missing"]),
    ("prefix", "extra", extra("more"), ["tensor more isn't expected"]),
    ("prefix", "layers", tensor(EMBEDDINGS, lambda t: t[:, :128]),
     [f"tensor {EMBEDDINGS} has shape [5, 128], expected [5, 192]"]),
    ("prefix", "tokens", tensor(EMBEDDINGS, lambda t: t[1:]),
     [f"tensor {EMBEDDINGS} has shape [4, 192], expected [5, 192]"]),
    ("prefix", "int", tensor(EMBEDDINGS, torch.Tensor.int), [f"tensor {EMBEDDINGS} has type torch.int32"]),
    ("prompt", "inf", tensor(EMBEDDINGS, poked(math.inf)), [f"tensor {EMBEDDINGS} holds NaN or infinity"]),
    ("prompt", "hidden size", tensor(EMBEDDINGS, lambda t: t[:, :32]),
     ["made for hidden size 32; the base has 64", f"tensor {EMBEDDINGS} has shape [6, 32], expected [6, 64]"]),
    ("p-tuning", "extra", extra("encoder.weight"), ["tensor encoder.weight isn't expected"]),
    ("p-tuning", "missing", without(EMBEDDINGS), [f"tensor {EMBEDDINGS} is missing"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "change", "expected"), [t[:1] + t[2:] for t in TENSORS], ids=[f"{t[0]}-{t[1]}" for t in TENSORS]
)
def test_damaged_tensors(
    specimen: Callable[[str], Specimen],
    spec: BaseSpec,
    tmp_path: Path,
    kind: str,
    change: Change,
    expected: list[str],
) -> None:
    damaged = specimen(kind)
    change(damaged)
    problems = refusals(damaged, spec, tmp_path)
    assert len(problems) == len(expected)
    for problem, text in zip(problems, expected, strict=True):
        assert problem.startswith(text)


OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    # What would change the result and isn't served.
    ("lora", {"use_dora": True}, "lora_magnitude_vector is missing"),
    ("lora", {"use_qalora": True}, "use_qalora=True isn't served"),
    ("lora", {"bias": "some"}, "bias 'some' means nothing to PEFT"),
    ("lora", {"layer_replication": [[0, 2], [1, 3]]}, "layer_replication=[[0, 2], [1, 3]] isn't served"),
    ("lora", {"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base's weights"),
    ("lora", {"init_lora_weights": "loftq"}, "init_lora_weights='loftq' changes the base's weights"),
    ("lora", {"target_parameters": ["mlp.w"]}, "target_parameters: 'mlp.w' is no weight of experts"),
    ("adalora", {"target_parameters": ["mlp.w"]}, "target_parameters=['mlp.w'] isn't served: only LoRA adapts"),
    ("adalora", {"alora_invocation_tokens": [1]}, "alora_invocation_tokens=[1] isn't served"),
    ("prompt", {"modules_to_save": ["norm"]}, "modules_to_save=['norm'] isn't served"),
    # Kinds.
    ("lora", {"peft_type": "SHADOW"}, "peft_type 'SHADOW' isn't served: it runs a second network beside"),
    ("lora", {"peft_type": "lora"}, "peft_type 'lora' isn't served"),
    ("lora", {"peft_type": None}, "peft_type None isn't served"),
    ("lora", {"peft_type": ["LORA"]}, "peft_type ['LORA'] isn't served"),
    ("lora", {"peft_type": "x" * 100_000}, "peft_type 'xxx"),
    ("lora", {"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS' isn't causal language modelling"),
    ("lora", {"task_type": ["CAUSAL_LM"]}, "task_type ['CAUSAL_LM'] isn't causal language modelling"),
    ("lora", {"base_model_name_or_path": 7}, "base_model_name_or_path has the wrong type: 7"),
    # Wrong types and values.
    ("lora", {"r": "8"}, "r has the wrong type: '8'"),
    ("lora", {"r": 4.0}, "r has the wrong type: 4.0"),
    ("lora", {"r": True}, "r has the wrong type: True"),
    ("lora", {"r": [4]}, "r has the wrong type: [4]"),
    ("lora", {"r": 0}, "rank 0 with alpha 8"),
    ("lora", {"r": -4}, "rank -4 with alpha 8"),
    ("lora", {"r": 10**400}, "isn't valid"),
    ("lora", {"lora_alpha": "8"}, "lora_alpha has the wrong type: '8'"),
    ("lora", {"lora_alpha": True}, "lora_alpha has the wrong type: True"),
    ("lora", {"lora_alpha": 10**400}, "isn't valid"),
    ("lora", {"lora_alpha": math.nan}, "rank 4 with alpha nan"),
    ("lora", {"lora_alpha": math.inf}, "rank 4 with alpha inf"),
    ("lora", {"lora_alpha": 1e300}, "scaling 2.5e+299 makes weights of model.layers.0.self_attn.q_proj infinite"),
    ("lora", {"rank_pattern": []}, "rank_pattern has the wrong type: []"),
    ("lora", {"rank_pattern": {"q_proj": "4"}}, "rank '4' with alpha 8"),
    ("lora", {"rank_pattern": {"q_proj": 2.5}}, "rank 2.5 with alpha 8"),
    ("lora", {"rank_pattern": {"q_proj": None}}, "rank None with alpha 8"),
    ("lora", {"rank_pattern": {"q_proj": True}}, "rank True with alpha 8"),
    ("lora", {"rank_pattern": {"q_(proj": 4}}, "rank_pattern is not a regular expression that can be matched"),
    ("lora", {"alpha_pattern": 3}, "alpha_pattern has the wrong type: 3"),
    ("lora", {"alpha_pattern": {"q_proj": [1]}}, "rank 4 with alpha [1]"),
    ("lora", {"alpha_pattern": {"*": 4}}, "alpha_pattern is not a regular expression that can be matched"),
    ("lora", {"use_rslora": "yes"}, "use_rslora has the wrong type: 'yes'"),
    ("lora", {"lora_bias": 1}, "lora_bias has the wrong type: 1"),
    ("lora", {"init_lora_weights": 3.5}, "init_lora_weights has the wrong type: 3.5"),
    ("lora", {"bias": False}, "bias has the wrong type: False"),
    # Targets.
    ("lora", {"target_modules": []}, "target_modules is empty"),
    ("lora", {"target_modules": ""}, "target_modules is empty"),
    ("lora", {"target_modules": None}, "target_modules is empty"),
    ("lora", {"target_modules": 3}, "target_modules has the wrong type: 3"),
    ("lora", {"target_modules": ["q_proj", "v_proj", "down_proj", 5]}, "target_modules must hold names: ["),
    ("lora", {"target_modules": r".*\.w_proj"}, r"target '.*\\.w_proj' matches no module"),
    ("lora", {"target_modules": "(q_proj"}, "target_modules, exclude_modules or layers_pattern is not a regular expression that can be matched"),
    ("lora", {"target_modules": r"(?:[a-z_.0-9]|\w\w|.)+[!?]"}, "that can be matched: it takes too long"),
    ("lora", {"rank_pattern": {r"(?:[a-z_.0-9]|\w\w|.)+[!?]": 4}}, "that can be matched: it takes too long"),
    ("lora", {"exclude_modules": "*"}, "target_modules, exclude_modules or layers_pattern is not a regular expression that can be matched"),
    ("lora", {"exclude_modules": 3}, "exclude_modules has the wrong type: 3"),
    ("lora", {"target_modules": ["q_proj", "v_proj", "down_proj", "mlp"]},
     "target model.layers.0.mlp is a LlamaMLP"),
    ("lora", {"layers_to_transform": "0"}, "layers_to_transform has the wrong type: '0'"),
    ("lora", {"layers_to_transform": True}, "layers_to_transform has the wrong type: True"),
    ("lora", {"layers_to_transform": [7]}, "exclude_modules or layers_to_transform leaves no module"),
    ("lora", {"exclude_modules": ".*"}, "exclude_modules or layers_to_transform leaves no module"),
    ("lora", {"layers_to_transform": [0], "layers_pattern": "("}, "is not a regular expression"),
    ("lora", {"layers_pattern": ["layers"]}, "layers_pattern without layers_to_transform"),
    ("lora", {"target_modules": ".*q_proj", "layers_to_transform": [0]},
     "layers_to_transform and layers_pattern go with a list of target_modules"),
    ("lora", {"target_modules": "all-linear", "layers_to_transform": 0},
     "layers_to_transform and layers_pattern go with a list of target_modules"),
    # Virtual tokens.
    ("prefix", {"num_virtual_tokens": 0}, "num_virtual_tokens must be at least 1, got 0"),
    ("prefix", {"num_virtual_tokens": -5}, "num_virtual_tokens must be at least 1, got -5"),
    ("prefix", {"num_virtual_tokens": None}, "num_virtual_tokens must be at least 1, got 0"),
    ("prefix", {"num_virtual_tokens": "5"}, "num_virtual_tokens has the wrong type: '5'"),
    ("prefix", {"num_virtual_tokens": 10**30}, f"tensor {EMBEDDINGS} has shape [5, 192]"),
    ("prefix", {"num_layers": 6, "num_attention_heads": 1, "token_dim": 16},
     "num_layers is 6, the base has 3"),
    ("prefix", {"num_attention_heads": 4}, "num_attention_heads is 4, the base has 2"),
    ("prefix", {"token_dim": 64}, "token_dim is 64, the base has 32"),
    ("prefix", {"num_transformer_submodules": 2}, "num_transformer_submodules other than 1"),
    ("prompt", {"num_virtual_tokens": 7}, f"tensor {EMBEDDINGS} has shape [6, 64], expected [7, 64]"),
    ("prompt", {"num_transformer_submodules": 2}, "num_transformer_submodules other than 1"),
    ("p-tuning", {"num_virtual_tokens": True}, "num_virtual_tokens has the wrong type: True"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options", "expected"), OPTIONS, ids=[f"{kind}-{str(o)[:60]}" for kind, o, _ in OPTIONS]
)
def test_configurations_that_cant_be_served(
    check_refused: CheckRefused, kind: str, options: dict[str, Any], expected: str
) -> None:
    check_refused(kind, options, expected)


def test_everything_that_is_wrong_is_told_at_once(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    damaged = specimen("lora")
    damaged.config.update(use_qalora=True, r="8")
    damaged.tensors["surplus"] = torch.zeros(1)
    del damaged.tensors[A]
    text = "; ".join(refusals(damaged, spec, tmp_path))
    for culprit in ("use_qalora=True", "r has the wrong type", "surplus", A):
        assert culprit in text


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt", "p-tuning"])
def test_an_adapter_for_another_size_of_the_same_family(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path, kind: str
) -> None:
    heads = {name: dataclasses.replace(site, kv_heads=4) for name, site in spec.attention.items()}
    linears = {
        name: dataclasses.replace(shape, in_features=2 * shape.in_features)
        for name, shape in spec.linears.items()
    }
    larger = dataclasses.replace(spec, hidden_size=128, linears=linears, attention=heads)
    assert any(
        "has shape" in problem or "the base has" in problem
        for problem in refusals(specimen(kind), larger, tmp_path)
    )


def test_layers_of_different_shapes_have_no_prefix(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    first, *others = spec.attention.items()
    uneven = {first[0]: dataclasses.replace(first[1], kv_heads=1), **dict(others)}
    problems = refusals(specimen("prefix"), dataclasses.replace(spec, attention=uneven), tmp_path)
    assert "layers have keys and values of different shapes" in problems[0]


@pytest.mark.parametrize(
    ("trained_on", "served", "warned"),
    [
        ("org/tiny", "org/tiny", False),
        ("/home/me/tiny/", "org/tiny", False),
        ("org/other", "org/tiny", True),
        ("", "org/tiny", False),
        (None, "org/tiny", False),
        ("org/other", "", False),
    ],
)
def test_another_name_of_the_base_is_only_a_warning(
    specimen: Callable[[str], Specimen],
    spec: BaseSpec,
    tmp_path: Path,
    trained_on: str | None,
    served: str,
    warned: bool,
) -> None:
    adapter = specimen("lora")
    adapter.config["base_model_name_or_path"] = trained_on
    base = dataclasses.replace(spec, name=served)
    warnings = compile_folder(adapter.save(tmp_path / "a"), base).warnings
    assert bool(warnings) == warned
    if warned:
        assert warnings[0].startswith(f"it was trained on {trained_on!r}, and the base is {served!r}: ")


def test_a_copy_of_the_base_under_another_name_is_the_same(
    specimen: Callable[[str], Specimen], llama: Path, tmp_path: Path
) -> None:
    base, renamed = tmp_path / "base", tmp_path / "renamed"
    for copy in (base, renamed):
        shutil.copytree(llama, copy)
    spec = inspect_without_weights(str(base))
    adapter = specimen("lora")
    for named, warned in ((renamed, False), (tmp_path / "nowhere", True)):
        adapter.config["base_model_name_or_path"] = str(named)
        warnings = compile_folder(adapter.save(tmp_path / f"adapter-{warned}"), spec).warnings
        assert any("it was trained on" in warning for warning in warnings) == warned


@pytest.mark.parametrize(
    ("kind", "limits", "expected"),
    [
        ("lora", {"rank": 3}, "rank 4 is over the limit of 3 (--max-adapter-rank)"),
        ("rslora-patterns", {"rank": 6}, "rank 7 is over the limit of 6 (--max-adapter-rank)"),
        ("prefix", {"virtual_tokens": 4}, "5 virtual tokens are over the limit of 4 (--max-virtual-tokens)"),
        ("p-tuning", {"virtual_tokens": 16}, "17 virtual tokens are over the limit of 16"),
    ],
)
def test_limits(
    specimen: Callable[[str], Specimen],
    spec: BaseSpec,
    tmp_path: Path,
    kind: str,
    limits: dict[str, int],
    expected: str,
) -> None:
    problems = refusals(specimen(kind), spec, tmp_path, AdapterLimits(**limits))
    assert len(problems) == 1
    assert expected in problems[0]
    at_the_limit = AdapterLimits(**{name: value + 1 for name, value in limits.items()})
    compile_folder(specimen(kind).save(tmp_path / "fits"), spec, at_the_limit)


def test_the_limit_in_bytes_is_of_what_is_compiled(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    halved = specimen("lora")
    halved.tensors = {name: t.half() for name, t in halved.tensors.items()}
    folder = halved.save(tmp_path / "a")
    compiled = compile_folder(folder, spec)
    assert compiled.compiled_bytes == 4 * compiled.parameters
    on_disk = (folder / "adapter_model.safetensors").stat().st_size
    assert on_disk < compiled.compiled_bytes
    compile_folder(folder, spec, AdapterLimits(compiled_bytes=compiled.compiled_bytes))
    problems = refusals(halved, spec, tmp_path, AdapterLimits(compiled_bytes=compiled.compiled_bytes - 1))
    assert problems == (
        f"{compiled.compiled_bytes} bytes are over the limit of {compiled.compiled_bytes - 1} "
        "(--max-adapter-bytes)",
    )


# ---- what comes out --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "asked", "kept"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, None, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
@pytest.mark.parametrize("kind", ["lora-bias", "prefix", "prompt"])
def test_the_type_that_adapters_are_kept_in(
    specimen: Callable[[str], Specimen],
    spec: BaseSpec,
    tmp_path: Path,
    kind: str,
    stored: torch.dtype,
    asked: torch.dtype | None,
    kept: torch.dtype,
) -> None:
    adapter = specimen(kind)
    adapter.tensors = {name: t.to(stored) for name, t in adapter.tensors.items()}
    compiled = compile_folder(adapter.save(tmp_path / "a"), spec, AdapterLimits(dtype=asked))
    weights = [t for t in compiled.tensors() if t.dim() > 1]
    assert weights
    assert {t.dtype for t in weights} == {kept}


@pytest.mark.parametrize("asked", [None, torch.bfloat16])
def test_a_file_of_mixed_types_has_one_type_for_each_module(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path, asked: torch.dtype | None
) -> None:
    adapter = specimen("lora")
    adapter.tensors = {
        name: t.bfloat16() if "lora_B" in name else t.float() for name, t in adapter.tensors.items()
    }
    compiled = compile_folder(adapter.save(tmp_path / "a"), spec, AdapterLimits(dtype=asked))
    assert {(w.a.dtype, w.b.dtype) for w in compiled.each("low_rank").values()} == {
        2 * (asked or torch.float32,)
    }


def test_a_value_that_the_kept_type_cant_hold(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    adapter = specimen("lora")
    adapter.tensors[A].view(-1)[0] = torch.finfo(torch.float32).max
    compile_folder(adapter.save(tmp_path / "a"), spec)
    problems = refusals(adapter, spec, tmp_path, AdapterLimits(dtype=torch.bfloat16))
    assert problems == (f"tensor {A} holds NaN or infinity",)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scaling_stays_beside_b_and_is_folded_into_the_bias(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path, rslora: bool
) -> None:
    adapter = specimen("lora-bias")
    adapter.config.update(use_rslora=rslora, lora_alpha=3)
    low_rank = compile_folder(adapter.save(tmp_path / "a"), spec).each("low_rank")[
        "model.layers.0.self_attn.q_proj"
    ]
    scaling = 3 / (2.0 if rslora else 4.0)
    assert torch.equal(low_rank.a, adapter.tensors[A])
    assert torch.equal(low_rank.b, adapter.tensors[B])
    assert low_rank.scaling == scaling
    assert low_rank.bias is not None
    assert torch.equal(low_rank.bias, adapter.tensors[f"{Q0}.lora_B.bias"] * scaling)


def test_prefix_rows_are_keys_and_values_by_layer(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    adapter = specimen("prefix")
    compiled = compile_folder(adapter.save(tmp_path / "a"), spec)
    assert isinstance(compiled.prefix, Prefix)
    assert (compiled.prefix.start, compiled.virtual_tokens, compiled.primitives) == (5, 5, ("prefix",))
    table = adapter.tensors[EMBEDDINGS].view(5, 6, 2, 16)
    for layer in range(3):
        assert torch.equal(compiled.prefix.keys[layer], table[:, 2 * layer])
        assert torch.equal(compiled.prefix.values[layer], table[:, 2 * layer + 1])


def test_a_soft_prompt_is_kept_as_it_is(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    adapter = specimen("p-tuning")
    compiled = compile_folder(adapter.save(tmp_path / "a"), spec)
    assert isinstance(compiled.prefix, SoftPrompt)
    assert torch.equal(compiled.prefix.embeddings, adapter.tensors[EMBEDDINGS])
    assert (compiled.kind, compiled.primitives, compiled.rank) == ("p_tuning", ("soft_prompt",), 0)
