"""PEFT's whole list: every kind and every option of LoRA is served or refused with a reason of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraConfig
from peft.utils import PeftType
from transformers import AutoModelForCausalLM

from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.files.refusals import judge_option, why_not_kind
from polygraft.adapters.kinds import KINDS
from polygraft.core.spec import BaseSpec
from polygraft.errors import AdapterInvalid
from tests.adapters.conftest import CheckIgnored, CheckRefused
from tests.adapters.specimen import Specimen, compile_folder
from tests.peft_folders import CAUSAL, TARGETS
from tests.peft_folders import KINDS as FOLDERS

DOCUMENT = Path(__file__).parents[3] / "docs" / "reference" / "kinds.md"


@pytest.mark.parametrize("kind", PeftType)
def test_every_kind_of_peft_is_served_or_refused_with_a_reason(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path, kind: PeftType
) -> None:
    assert (kind.value in KINDS) != bool(why_not_kind(kind.value))
    assert f"`{kind.value}`" in DOCUMENT.read_text(), "make docs-tables"
    if kind.value in KINDS:
        return
    adapter = specimen("lora")
    adapter.config["peft_type"] = kind.value
    with pytest.raises(AdapterInvalid) as caught:
        compile_folder(adapter.save(tmp_path / "a"), spec)
    (problem,) = caught.value.problems
    assert problem.startswith(
        f"peft_type '{kind.value}' isn't served: {why_not_kind(kind.value)}; served are"
    )


# What other values than the default mean for an answer, and is served.
HONOURED = {
    "r", "target_modules", "exclude_modules", "lora_alpha", "use_rslora", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "lora_bias", "use_dora", "init_lora_weights", "bias", "alora_invocation_tokens",
    "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "target_parameters",
}  # fmt: skip
OF_TRAINING = {
    "lora_dropout", "fan_in_fan_out", "megatron_config", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
}  # fmt: skip
PROVENANCE = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode",
}  # fmt: skip


@pytest.mark.parametrize(
    "option",
    sorted({f.name for f in dataclasses.fields(LoraConfig)} - HONOURED - OF_TRAINING - PROVENANCE),
)
def test_every_option_of_lora_is_served_or_refused_with_a_reason(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path, option: str
) -> None:
    adapter = specimen("lora")
    adapter.config[option] = {"anything": 1}
    with pytest.raises(AdapterInvalid) as caught:
        compile_folder(adapter.save(tmp_path / "a"), spec)
    refused, why = judge_option(KINDS["LORA"].unserved, option)
    assert refused
    assert why
    assert caught.value.problems == (f"{option}={{'anything': 1}} isn't served: {why}",)


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_of_peft_is_taken_or_refused(
    specimen: Callable[[str], Specimen],
    spec: BaseSpec,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else one would be dropped that PEFT doesn't drop."""
    seen: list[set[str]] = []
    option, ignore = FolderReader.option, FolderReader.ignore

    def noting_option(reader: FolderReader, key: str, *rest: Any) -> Any:
        seen[-1].add(key)
        return option(reader, key, *rest)

    def noting_ignore(reader: FolderReader, *keys: str) -> None:
        seen[-1].update(keys)
        ignore(reader, *keys)

    monkeypatch.setattr(FolderReader, "option", noting_option)
    monkeypatch.setattr(FolderReader, "ignore", noting_ignore)
    known = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])} - PROVENANCE
    for name in FOLDERS:
        one = specimen(name)
        if one.config["peft_type"] == kind:
            seen.append(set())
            compile_folder(one.save(tmp_path / name), spec)
    assert seen
    assert set(KINDS[kind].unserved) == known - set().union(*seen)


IGNORED: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"merge_weights": True}),  # of PEFT 0.2
    ("lokr", {"bias": "all", "use_rslora": True}),
    ("deft", {"use_dora": True}),
    ("loha", {"lora_alpha": 16}),
    ("ia3", {"trainable_token_indices": [1], "ensure_weight_tying": True}),
    ("cartridge", {"prefix_projection": True}),
    ("lora", {"an_option_of_tomorrow": {"with": ["options"]}}),
]


@pytest.mark.parametrize(("kind", "options"), IGNORED)
def test_what_peft_drops_is_dropped_with_a_warning(
    check_ignored: CheckIgnored, kind: str, options: dict[str, Any]
) -> None:
    given = {"peft_type": kind.upper(), **options}
    kept = PEFT_TYPE_TO_CONFIG_MAPPING[given["peft_type"]].from_peft_type(**given)
    assert not any(hasattr(kept, key) for key in options)
    check_ignored(kind, options)


@pytest.mark.parametrize("option", ["enable_lora", "use_mora", "dora_wd"])
def test_what_changes_the_result_is_refused_though_peft_drops_it(
    check_refused: CheckRefused, option: str
) -> None:
    check_refused("lora", {option: [True]}, f"{option}=[True] isn't served: ")


CONVERTED = "save it with path_initial_model_for_weight_conversion"
INITS: list[tuple[Any, str]] = [
    (True, ""), (False, ""), (None, ""), ("gaussian", ""), ("orthogonal", ""), ("eva", ""), ("mica", ""),
    ("pissa", CONVERTED), ("pissa_niter_16", CONVERTED), ("olora", CONVERTED), ("corda", CONVERTED),
    ("lora_ga", CONVERTED), ("loftq", "train it after replace_lora_weights_loftq instead"),
    ("invented", "changes the base's weights"),
]  # fmt: skip


@pytest.mark.parametrize(("init", "expected"), INITS, ids=[str(init) for init, _ in INITS])
def test_initialisations(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path, init: Any, expected: str
) -> None:
    adapter = specimen("lora")
    adapter.config["init_lora_weights"] = init
    folder = adapter.save(tmp_path / "a")
    if not expected:
        compile_folder(folder, spec)
        return
    with pytest.raises(AdapterInvalid) as caught:
        compile_folder(folder, spec)
    (problem,) = caught.value.problems
    assert problem.startswith(f"init_lora_weights={init!r} changes the base's weights; ")
    assert expected in problem


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_a_converted_folder_is_the_same_model_on_the_base_as_it_was(
    llama: Path, spec: BaseSpec, tmp_path: Path, init: str
) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS["llama"], init_lora_weights=init, **CAUSAL)
    model = peft.get_peft_model(base, config)
    config.init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    config.init_lora_weights = init
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(AdapterInvalid, match="changes the base's weights"):
        compile_folder(tmp_path / "trained", spec)
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    compiled = compile_folder(tmp_path / "converted", spec)
    assert compiled.rank == 8
    merged = model.merge_and_unload().state_dict()
    for module, low_rank in compiled.each("low_rank").items():
        name = f"{module}.weight"
        assert (merged[name] - before[name]).abs().max() > 0.01
        torch.testing.assert_close(before[name] + low_rank.product, merged[name], rtol=1e-4, atol=1e-5)
