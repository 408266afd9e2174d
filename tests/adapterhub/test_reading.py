"""AdapterHub's folders, fail closed: every class of damage is refused, and the text names the culprit."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from polygraft.adapters.compile import compile_adapter, run_to_end
from polygraft.adapters.files.adapterhub_form import ADAPTERHUB_PICKLE, ADAPTERHUB_WEIGHTS, HEAD_CONFIG
from polygraft.adapters.files.folder import AdapterFolder, Weights
from polygraft.adapters.limits import AdapterLimits
from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.primitives import Prefix
from polygraft.core.spec import BaseSpec
from polygraft.errors import AdapterInvalid
from tests.adapterhub.library import FIXTURES, REFUSED, keys
from tests.adapters.specimen import Specimen, compile_folder

# Every sort of tensor, in every combination that is read by code of its own.
ON_LLAMA = (
    "seq_bn_inv", "prelu_inv", "double_seq_bn", "par_bn-ln", "ln_after-sum-inside", "scaling-learned",
    "scaling-channel", "compacter", "phm-own-factorized-rule", "phm-whole-w", "phm-shared-w",
    "lora-everywhere", "ia3-alpha", "vera", "dora", "prefix", "prefix-flat", "prefix-leave_out", "mam",
    "union-lora-bn",
)  # fmt: skip
ON_GPT2 = ("lora", "lora-everywhere", "ia3", "prefix", "unipelt-ungated", "vera-mlp")
SPECIMENS = [("llama", key) for key in ON_LLAMA] + [("gpt2", key) for key in ON_GPT2]
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def refusals(bases: Callable[[str], BaseSpec], tmp_path: Path) -> Callable[[Specimen, str], tuple[str, ...]]:
    """Why a specimen isn't loaded."""
    number = itertools.count()

    def get(specimen: Specimen, architecture: str = "llama") -> tuple[str, ...]:
        with pytest.raises(AdapterInvalid) as caught:
            compile_folder(specimen.save(tmp_path / str(next(number))), bases(architecture))
        assert len(str(caught.value)) < 20_000
        return caught.value.problems

    return get


@pytest.fixture
def compiled(bases: Callable[[str], BaseSpec], tmp_path: Path) -> Callable[[Specimen, str], AdapterWeights]:
    """A specimen's primitives."""
    number = itertools.count()

    def get(specimen: Specimen, architecture: str = "llama") -> AdapterWeights:
        return compile_folder(specimen.save(tmp_path / f"intact-{next(number)}"), bases(architecture))

    return get


def blocks(specimen: Specimen) -> list[dict[str, Any]]:
    """The methods of a specimen's configuration."""
    config = specimen.config["config"]
    return config["configs"] if config.get("architecture") == "union" else [config]


def one_of_each(specimen: Specimen) -> Iterator[str]:
    """A tensor of every sort that a folder holds."""
    yield from {".".join(name.split(".")[-3:]): name for name in specimen.tensors}.values()


@pytest.mark.parametrize(("architecture", "key"), SPECIMENS)
def test_damaged_tensors(
    specimen: Callable[..., Specimen], refusals: Callable[..., tuple[str, ...]], architecture: str, key: str
) -> None:
    for name in one_of_each(specimen(key, architecture)):
        damaged = specimen(key, architecture)
        whole = damaged.tensors.pop(name)
        # Without its one tensor, a module of (IA)^3 isn't there at all.
        missing = (f"tensor {name} is missing", "tensor", "the configuration asks for")
        assert any(part in " ".join(refusals(damaged, architecture)) for part in missing)
        damaged.tensors[f"{name}.more"] = whole
        assert f"tensor {name}.more isn't expected" in refusals(damaged, architecture)
        damaged = specimen(key, architecture)
        damaged.tensors[name] = whole[None]
        assert any(f"tensor {name} has shape [1, " in problem for problem in refusals(damaged, architecture))
        for wrong in (whole.double(), whole.int(), whole.to(torch.complex64)):
            damaged.tensors[name] = wrong
            problems = refusals(damaged, architecture)
            assert any(problem.startswith(f"tensor {name} has type torch.") for problem in problems)
        damaged.tensors[name] = torch.cat([whole, whole], dim=-1)
        assert any(
            f"{name} has shape [" in problem or "sizes of" in problem
            for problem in refusals(damaged, architecture)
        )
        for bad in (math.nan, -math.inf):
            damaged.tensors[name] = whole.clone()
            damaged.tensors[name].view(-1)[-1] = bad
            assert f"tensor {name} holds NaN or infinity" in refusals(damaged, architecture)


@pytest.mark.parametrize(("architecture", "key"), SPECIMENS)
def test_options_that_nobody_knows(
    specimen: Callable[..., Specimen], refusals: Callable[..., tuple[str, ...]], architecture: str, key: str
) -> None:
    for value in (1, "x", [0], {"a": None}, 0.5, True):
        damaged = specimen(key, architecture)
        damaged.config["invented"] = value
        assert refusals(damaged, architecture) == (f"invented={value!r} isn't served",)
        for at, block in enumerate(blocks(specimen(key, architecture))):
            damaged = specimen(key, architecture)
            blocks(damaged)[at]["invented"] = value
            where = (
                "config"
                if block is damaged.config["config"] or len(blocks(damaged)) == 1
                else f"config.configs[{at}]"
            )
            assert refusals(damaged, architecture) == (f"{where}.invented={value!r} isn't served",)


STRANGE = [
    None,
    True,
    False,
    0,
    -1,
    3,
    10**30,
    0.0,
    0.5,
    math.nan,
    math.inf,
    "",
    "x",
    [],
    ["q"],
    [0, None],
    {},
    {"0": 4},
]


ONE_OF_EACH_METHOD = [
    ("llama", key) for key in ("double_seq_bn_inv", "compacter", "lora", "vera", "dora", "prefix", "mam")
] + [("gpt2", "lora"), ("gpt2", "ia3")]


@pytest.mark.parametrize(("architecture", "key"), ONE_OF_EACH_METHOD)
def test_strange_values_are_served_or_refused_and_nothing_else(
    specimen: Callable[..., Specimen], bases: Callable[[str], BaseSpec], architecture: str, key: str
) -> None:
    intact = specimen(key, architecture)
    weights = save(intact.tensors)
    places = [(None, name) for name in intact.config]
    places += [(at, name) for at, block in enumerate(blocks(intact)) for name in block]
    for (at, name), value in itertools.product(places, STRANGE):
        damaged = Specimen(copy.deepcopy(intact.config), {})
        (damaged.config if at is None else blocks(damaged)[at])[name] = value
        folder = AdapterFolder("strange", damaged.config, Weights(weights), "")
        with contextlib.suppress(AdapterInvalid):
            run_to_end(compile_adapter(folder, bases(architecture), AdapterLimits()))


def option(**values: Any) -> Change:
    return lambda block: block.update(values)


OPTIONS: list[tuple[str, Change, str]] = [
    ("seq_bn", option(use_gating=True), "config.use_gating=True isn't served: its gate averages over all tokens"),
    ("prefix", option(use_gating=True), "config.use_gating=True isn't served: its gate averages over all tokens"),
    ("lora", option(use_gating=True), "config.use_gating=True isn't served: its gate averages over all tokens"),
    ("seq_bn", option(residual_before_ln="post_add"), "config.residual_before_ln has no meaning in a pre-norm model: 'post_add'"),
    ("seq_bn", option(residual_before_ln=None), "config.residual_before_ln has the wrong type: None"),
    ("seq_bn", option(original_ln_after=None), "config.original_ln_after has the wrong type: None"),
    ("seq_bn", option(non_linearity="xielu"), "config.non_linearity is an activation that isn't served: 'xielu'"),
    ("seq_bn", lambda block: block.pop("non_linearity"), "config.non_linearity is missing: None"),
    ("seq_bn", lambda block: block.pop("reduction_factor"), "config.reduction_factor isn't valid for layer 0: None"),
    ("seq_bn", option(reduction_factor={"0": 16}), "config.reduction_factor isn't valid for layer 1"),
    ("seq_bn", option(reduction_factor=8), "adapter_down.0.weight has shape [2, 32], expected [4, 32]"),
    ("seq_bn", option(reduction_factor=0), "config.reduction_factor isn't valid for layer 0: 0"),
    ("seq_bn", option(scaling="both"), "config.scaling must be a number, 'learned' or 'channel': 'both'"),
    ("seq_bn", option(scaling=1e39), "the scaling makes weights of model.layers.0.output_adapters.adapters.seq_bn infinite"),
    ("seq_bn", option(ln_before=True), "adapter_down.1.weight is missing"),
    ("seq_bn", option(leave_out=[0]), "tensor model.layers.0.output_adapters.adapters.seq_bn.adapter_down.0.bias isn't expected"),
    ("seq_bn", option(leave_out=["0"]), "config.leave_out must hold layers' indices: ['0']"),
    ("seq_bn", option(mh_adapter=True), "model.layers.0.attention_adapters.adapters.seq_bn.adapter_down.0.weight is missing"),
    ("seq_bn", option(architecture="reft"), "config.architecture isn't served, it changes tokens by their place"),
    ("seq_bn", option(architecture="prompt_tuning"), "config.architecture isn't served, the library runs it on no"),
    ("seq_bn", option(architecture="mtl_lora"), "config.architecture isn't served, it has weights for each of several tasks"),
    ("seq_bn", option(architecture="new"), "config.architecture isn't served (lora, prefix_tuning and union are): 'new'"),
    ("seq_bn", option(architecture="union"), "config.architecture isn't served"),
    ("seq_bn_inv", option(inv_adapter="glow"), "config.inv_adapter isn't served: the library's own block can't run on sequences"),
    ("seq_bn_inv", option(inv_adapter="new"), "config.inv_adapter isn't known: 'new'"),
    ("seq_bn_inv", option(inv_adapter_reduction_factor=None), "config.inv_adapter_reduction_factor isn't valid: None"),
    ("seq_bn_inv", option(inv_adapter_reduction_factor=17), "config.inv_adapter_reduction_factor isn't valid: 17"),
    ("seq_bn_inv", option(inv_adapter=None), "tensor model.invertible_adapters.seq_bn_inv.F.0.bias isn't expected"),
    ("compacter", option(phm_dim=5), "phm_dim 5 doesn't divide 32 and 8, the sizes of model.layers.0.attention_adapters"),
    ("compacter", option(phm_dim=0), "config.phm_dim isn't valid with phm_rank 1: 0"),
    ("compacter", option(shared_phm_rule=False), "adapter_down.0.phm_rule is missing"),
    ("phm-shared-w", option(factorized_phm_W=False), "config.shared_W_phm goes with factorized_phm_W, as in the library"),
    ("phm-shared-w", option(reduction_factor={"0": 4, "default": 8}), "W_down_right has shape [4, 2, 2], expected [4, 2, 1]"),
    ("lora", option(r=3), "lora_A has shape [4, 32], expected [3, 32]"),
    ("lora", option(r=0), "config.r isn't valid with alpha 6: 0"),
    ("lora", option(alpha=math.nan), "config.r isn't valid with alpha nan: 4"),
    ("lora", option(alpha=1e300), "the arithmetic makes weights of model.layers.0.self_attn.q_proj infinite"),
    ("lora", option(attn_matrices=["q"]), "model.layers.0.self_attn.v_proj.loras.lora.lora_A isn't expected"),
    ("lora", option(intermediate_lora=True), "model.layers.0 has weights for 0 modules outside its attention, the configuration asks for 1"),
    ("lora", option(selfattn_lora=False), "model.layers.0.self_attn.q_proj.loras.lora.lora_A isn't expected"),
    ("lora", option(composition_mode="new"), "config.composition_mode isn't known: 'new'"),
    ("lora", option(composition_mode="scale"), "config.composition_mode goes with r 1"),
    ("lora", option(use_dora=True), "config.use_dora isn't served unless alpha is r: True"),
    ("lora", option(vera_d=0.1), "loras.lora.vera_D is missing"),
    ("ia3", option(alpha=1e300), "alpha makes factors of model.layers.0.self_attn.k_proj infinite"),
    ("prefix", option(prefix_length=4), "wte.weight has shape [5, 32], expected [4, 32]"),
    ("prefix", option(prefix_length=0), "config.prefix_length must be at least 1: 0"),
    ("prefix", option(bottleneck_size=4), "control_trans.0.weight has shape [12, 32], expected [4, 32]"),
    ("prefix", option(leave_out=[0]), "control_trans.2.weight has shape [64, 12], expected [32, 12]"),
    ("prefix", option(leave_out=[0, 1]), "leave_out leaves no layer of the base"),
    ("prefix", option(flat=True), "control_trans is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "change", "text"), OPTIONS, ids=[f"{o[0]}-{o[2][-60:]}" for o in OPTIONS])
def test_options(
    specimen: Callable[..., Specimen],
    refusals: Callable[..., tuple[str, ...]],
    key: str,
    change: Change,
    text: str,
) -> None:
    damaged = specimen(key)
    change(damaged.config["config"])
    assert any(text in problem for problem in refusals(damaged))


FOLDERS: list[tuple[dict[str, Any], str]] = [
    ({"config": None}, "config must hold a method's options"),
    ({"config": []}, "config has the wrong type: []"),
    ({"config": {}}, "config must hold a method's options"),
    ({"config": "seq_bn"}, "config has the wrong type: 'seq_bn'"),
    ({"config": {"architecture": "union"}}, "config.architecture isn't served"),
    ({"config": {"architecture": "union", "configs": [1]}}, "config.architecture isn't served"),
    ({"config": {"architecture": "union", "configs": []}}, "it has weights for nothing in the base"),
    ({"name": None}, "name is missing, which is part of the tensors' names"),
    ({"name": "other"}, "model.layers.0.output_adapters.adapters.other.adapter_down.0.weight is missing"),
    ({"hidden_size": 64}, "hidden_size is 64, the base has 32"),
    ({"model_type": "mistral"}, "model_type is 'mistral', the base is 'llama'"),
    ({"peft_type": "LORA"}, "adapter_model.safetensors is missing"),
]


@pytest.mark.parametrize(("values", "text"), FOLDERS, ids=[text[-50:] for _, text in FOLDERS])
def test_what_a_folder_says_of_itself(
    specimen: Callable[..., Specimen],
    refusals: Callable[..., tuple[str, ...]],
    values: dict[str, Any],
    text: str,
) -> None:
    damaged = specimen("seq_bn")
    damaged.config.update(values)
    assert any(text in problem for problem in refusals(damaged))


def test_a_method_without_weights(
    specimen: Callable[..., Specimen], refusals: Callable[..., tuple[str, ...]]
) -> None:
    damaged = specimen("seq_bn")
    damaged.config["config"]["output_adapter"] = False
    damaged.tensors = {}
    assert refusals(damaged) == ("it has weights for nothing in the base",)


def test_two_methods_in_one_place(
    specimen: Callable[..., Specimen], refusals: Callable[..., tuple[str, ...]]
) -> None:
    damaged = specimen("union-bn")
    first, second = blocks(damaged)
    second.update(mh_adapter=False, output_adapter=True)
    assert any("is missing" in problem for problem in refusals(damaged))
    second.update(first)
    assert any("is missing" in problem for problem in refusals(damaged))


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "gemma3_text"])
def test_another_models_adapter(
    specimen: Callable[..., Specimen], refusals: Callable[..., tuple[str, ...]], architecture: str
) -> None:
    assert refusals(specimen("lora"), architecture) == (
        f"model_type is 'llama', the base is {architecture!r}",
    )


def test_bottlenecks_before_a_norm(bases: Callable[[str], BaseSpec]) -> None:
    ((architecture, key),) = REFUSED
    with pytest.raises(AdapterInvalid, match="the adapters would act before that") as caught:
        compile_folder(FIXTURES / architecture / key, bases(architecture))
    assert len(caught.value.problems) == 1


def test_a_base_without_residual_sites(base: BaseSpec) -> None:
    parallel = dataclasses.replace(base, residual={})
    with pytest.raises(AdapterInvalid, match="don't add one part's output to the residual stream"):
        compile_folder(FIXTURES / "llama" / "seq_bn", parallel)
    with pytest.raises(AdapterInvalid, match="whose layers don't add up their parts"):
        compile_folder(FIXTURES / "llama" / "seq_bn_inv", parallel)


def test_a_prefix_on_sliding_windows(base: BaseSpec) -> None:
    attention = {name: dataclasses.replace(site, window=8) for name, site in base.attention.items()}
    with pytest.raises(AdapterInvalid, match="every row sees the whole prefix"):
        compile_folder(FIXTURES / "llama" / "prefix", dataclasses.replace(base, attention=attention))


def test_dora_beside_a_bias(base: BaseSpec) -> None:
    linears = {name: dataclasses.replace(shape, has_bias=True) for name, shape in base.linears.items()}
    with pytest.raises(AdapterInvalid, match=r"use_dora isn't served on model.layers.0.self_attn.q_proj"):
        compile_folder(FIXTURES / "llama" / "dora", dataclasses.replace(base, linears=linears))


LIMITS = [
    ("prefix", AdapterLimits(virtual_tokens=4), "5 virtual tokens are over the limit of 4"),
    ("lora", AdapterLimits(rank=3), "rank 4 is over the limit of 3"),
    ("vera", AdapterLimits(rank=5), "rank 6 is over the limit of 5"),
    ("compacter", AdapterLimits(compiled_bytes=7000), "compiled it is over the limit of 7000 bytes"),
]


@pytest.mark.parametrize(("key", "limits", "text"), LIMITS)
def test_limits(base: BaseSpec, key: str, limits: AdapterLimits, text: str) -> None:
    with pytest.raises(AdapterInvalid, match=text):
        compile_folder(FIXTURES / "llama" / key, base, limits)


@pytest.mark.parametrize("key", keys("llama"))
def test_weights_are_kept_in_the_type_that_is_asked_for(base: BaseSpec, key: str) -> None:
    compiled = compile_folder(FIXTURES / "llama" / key, base, AdapterLimits(dtype=torch.bfloat16))
    for bottleneck in compiled.bottlenecks.values():
        assert {bottleneck.down.dtype, bottleneck.up.dtype} == {torch.bfloat16}
        assert bottleneck.down_bias is None or bottleneck.down_bias.dtype == torch.float32
    for low_rank in compiled.each("low_rank").values():
        assert {low_rank.a.dtype, low_rank.b.dtype} == {torch.bfloat16}
    if isinstance(compiled.prefix, Prefix):
        assert {keys.dtype for keys in compiled.prefix.keys} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in compiled.tensors())


KINDS = {
    "seq_bn": ("bottleneck", ("bottleneck",)),
    "seq_bn_inv": ("bottleneck", ("bottleneck", "coupling")),
    "lora": ("lora", ("low_rank",)),
    "dora": ("lora", ("low_rank", "scale")),
    "vera": ("vera", ("low_rank",)),
    "ia3": ("ia3", ("scale",)),
    "prefix": ("prefix_tuning", ("prefix",)),
    "mam": ("union", ("bottleneck", "prefix")),
    "unipelt-ungated": ("union", ("low_rank", "bottleneck", "prefix")),
}


@pytest.mark.parametrize("key", KINDS)
def test_kind_and_primitives(base: BaseSpec, key: str) -> None:
    compiled = compile_folder(FIXTURES / "llama" / key, base)
    assert (compiled.kind, compiled.primitives) == KINDS[key]
    assert compiled.mergeable == (compiled.kind in ("lora", "vera", "ia3"))
    assert compiled.parameters > 0


def test_only_the_classes_that_invert_do(
    specimen: Callable[..., Specimen], compiled: Callable[..., AdapterWeights]
) -> None:
    for model_class, inverted in (("LlamaForCausalLM", False), ("LlamaAdapterModel", True)):
        one = specimen("seq_bn_inv")
        one.config["model_class"] = model_class
        coupling = compiled(one).coupling
        assert coupling is not None
        assert coupling.inverted == inverted
    of_hooks = compiled(specimen("seq_bn_inv", "qwen2"), "qwen2").coupling
    assert of_hooks is not None
    assert of_hooks.inverted


def test_layers_without_a_prefix(base: BaseSpec) -> None:
    prefix = compile_folder(FIXTURES / "llama" / "prefix-leave_out", base).prefix
    assert isinstance(prefix, Prefix)
    assert [keys.shape for keys in prefix.keys] == [(0, 2, 8), (19, 2, 8)]
    assert (prefix.virtual_tokens, prefix.bare_layers, prefix.start) == (19, (0,), 0)


def test_copies_of_a_tensor_must_be_the_same(
    specimen: Callable[..., Specimen],
    compiled: Callable[..., AdapterWeights],
    refusals: Callable[..., tuple[str, ...]],
) -> None:
    pool = "prefix_tunings.prefix.self_prefix.wte.weight"
    other = f"model.layers.1.self_attn.prefix_tuning.pool.{pool}"
    one = specimen("prefix")
    one.tensors[other] = one.tensors[f"model.prefix_tuning.{pool}"].clone()
    compiled(one)
    one.tensors[other][0, 0] += 1
    assert refusals(one) == (f"tensors model.prefix_tuning.{pool} and {other} must be the same and differ",)


def test_a_prefix_that_was_flattened_after_training(
    specimen: Callable[..., Specimen], compiled: Callable[..., AdapterWeights]
) -> None:
    """`eject_prefix_tuning` leaves `flat` as it was."""
    flat, ejected = specimen("prefix-flat"), specimen("prefix-flat")
    ejected.config["config"]["flat"] = False
    for one, other in zip(compiled(flat).tensors(), compiled(ejected).tensors(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("version", "scaled"), [("adapters.1.0.1", False), ("adapters.1.1.0", True), ("3.2.1", True)]
)
def test_lora_of_versions_that_forgot_its_scaling(
    specimen: Callable[..., Specimen], compiled: Callable[..., AdapterWeights], version: str, scaled: bool
) -> None:
    one = specimen("lora")
    one.config["version"] = version
    name = "model.layers.0.self_attn.q_proj"
    b = one.tensors[f"{name}.loras.lora.lora_B"]
    low_rank = compiled(one).each("low_rank")[name]
    assert torch.equal(low_rank.b, b)
    assert low_rank.scaling == (1.5 if scaled else 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("scaling", {"scaling": 0.3}),
        ("scaling-learned", {}),
        ("scaling-channel", {}),
        ("act-prelu", {"scaling": 2.7}),
        ("ln_before", {"scaling": 0.3}),
        ("lora", {"alpha": 20}),
        ("vera", {"alpha": 20}),
        ("prelu_inv", {}),
    ],
)
def test_what_a_file_of_sixteen_bits_holds_is_not_rounded_again(
    specimen: Callable[..., Specimen],
    compiled: Callable[..., AdapterWeights],
    kind: str,
    options: dict[str, object],
    dtype: torch.dtype,
) -> None:
    narrow, wide = specimen(kind), specimen(kind)
    for one in (narrow, wide):
        one.config["config"].update(options)
        one.tensors = {name: tensor.to(dtype) for name, tensor in one.tensors.items()}
    wide.tensors = {name: tensor.float() for name, tensor in wide.tensors.items()}
    found = [compiled(one) for one in (narrow, wide)]
    for mine, exact in zip(*(one.tensors() for one in found), strict=True):
        assert torch.equal(mine.float(), exact)
    of_lora, of_bottlenecks = (
        [[part.scaling for part in parts.values()] for parts in several]
        for several in ([one.each("low_rank") for one in found], [one.bottlenecks for one in found])
    )
    assert of_lora[0] == of_lora[1]
    assert of_bottlenecks[0] == of_bottlenecks[1]


def test_activations_of_the_first_version(
    specimen: Callable[..., Specimen], compiled: Callable[..., AdapterWeights]
) -> None:
    for name, old, now in (("gelu", "gelu_tanh", "gelu"), ("relu", "relu", "relu")):
        one = specimen("act-gelu")
        one.config["config"]["non_linearity"] = name
        assert compiled(one).bottlenecks["model.layers.0.feed_forward"].activation == now
        del one.config["version"]
        assert compiled(one).bottlenecks["model.layers.0.feed_forward"].activation == old


def test_a_name_of_another_base_is_a_warning(
    specimen: Callable[..., Specimen], compiled: Callable[..., AdapterWeights]
) -> None:
    one = specimen("lora")
    one.config["model_name"] = "someone/else"
    assert "it was trained on 'someone/else'" in compiled(one).warnings[0]


def test_files(specimen: Callable[..., Specimen], base: BaseSpec, tmp_path: Path) -> None:
    folder = specimen("seq_bn").save(tmp_path / "one")
    (folder / "adapter_model.safetensors").write_bytes(b"PEFT's, which isn't read")
    compile_folder(folder, base)
    (folder / HEAD_CONFIG).write_text("{}")
    with pytest.raises(AdapterInvalid, match="it brings a head of its own"):
        compile_folder(folder, base)
    (folder / HEAD_CONFIG).unlink()
    (folder / ADAPTERHUB_WEIGHTS).unlink()
    with pytest.raises(AdapterInvalid, match=f"{ADAPTERHUB_WEIGHTS} is missing"):
        compile_folder(folder, base)
    (folder / ADAPTERHUB_PICKLE).write_bytes(b"")
    with pytest.raises(
        AdapterInvalid, match=r"polygraft adapters convert FOLDER OUT`.* use_safetensors=True"
    ):
        compile_folder(folder, base)
