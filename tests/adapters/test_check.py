"""`polygraft adapters check`: what the report says, and that it says what loading says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from polygraft.adapters.check import CheckReport, check_against, check_folder
from polygraft.adapters.kinds import AdapterLimits
from polygraft.base.spec import BaseSpec
from polygraft.errors import BaseModelError
from tests.adapters.specimen import Specimen
from tests.engines import make_engine
from tests.peft_folders import KINDS


def test_a_lora_in_numbers(llama_store: Path, llama: Path) -> None:
    folder = llama_store / "rslora-patterns"
    report = check_folder(folder, str(llama))
    # rank 2 on q (64 to 64) and 4 on v (64 to 32) and down (128 to 64) of each layer, but 7 on layer 1's down.
    q, v, down = (64 + 64), (64 + 32), (128 + 64)
    parameters = 3 * (2 * q + 4 * v) + 2 * 4 * down + 7 * down
    assert report == CheckReport(
        folder=str(folder),
        fits=True,
        base_parameters=report.base_parameters,
        kind="lora",
        primitives=("low_rank",),
        modules=9,
        rank=7,
        ranks={2: 3, 4: 5, 7: 1},
        virtual_tokens=0,
        parameters=parameters,
        share_of_base=parameters / report.base_parameters,
        disk_bytes=(folder / "adapter_model.safetensors").stat().st_size,
        compiled_bytes=4 * parameters,
    )
    attention = 2 * 64 * 64 + 2 * 64 * 32
    assert report.base_parameters == 288 * 64 + 3 * (attention + 3 * 64 * 128 + 2 * 64) + 64


def test_a_prefix_in_numbers(llama_store: Path, llama: Path) -> None:
    report = check_folder(llama_store / "prefix", str(llama))
    assert (report.kind, report.primitives, report.modules) == ("prefix_tuning", ("prefix",), 3)
    assert (report.virtual_tokens, report.rank, report.ranks) == (5, 0, {})
    assert (report.parameters, report.compiled_bytes) == (5 * 2 * 3 * 2 * 16, 4 * 5 * 2 * 3 * 2 * 16)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # without biases and with
def test_the_report_agrees_with_what_the_engine_loads(
    adapter_store: Callable[[str], Path],
    tiny_model: Callable[[str], Path],
    specs: Callable[[str], BaseSpec],
    architecture: str,
) -> None:
    store = adapter_store(architecture)
    engine = make_engine(tiny_model(architecture), store)
    for kind in KINDS:
        report = check_against(store / kind, specs(architecture), AdapterLimits())
        info = engine.adapters.registry.get(kind)
        fields = (
            "kind", "primitives", "modules", "rank", "virtual_tokens", "parameters", "disk_bytes",
            "compiled_bytes", "warnings",
        )  # fmt: skip
        assert [getattr(report, f) for f in fields] == [getattr(info, f) for f in fields]


def test_what_doesnt_fit_says_why(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    broken = specimen("lora")
    broken.config["use_qalora"] = True
    report = check_against(broken.save(tmp_path / "a"), spec, AdapterLimits())
    assert not report.fits
    assert len(report.problems) == 1
    assert report.problems[0].startswith("use_qalora=True isn't served: QA-LoRA pools")
    assert report.base_parameters == spec.parameters


@pytest.mark.parametrize("what", ["nothing", "file"])
def test_a_folder_that_is_none(tmp_path: Path, spec: BaseSpec, what: str) -> None:
    (tmp_path / "file").write_text("text")
    report = check_against(tmp_path / what, spec, AdapterLimits())
    assert not report.fits
    assert "adapter_config.json" in report.problems[0]


def test_a_base_that_is_none(llama_store: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BaseModelError, match="empty"):
        check_folder(llama_store / "lora", str(tmp_path / "empty"))
