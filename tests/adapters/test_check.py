"""`polygraft adapters check`: what the report says, and that it says what loading says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig, LlamaConfig

from polygraft.adapters.limits import AdapterLimits
from polygraft.base.default_config import default_config
from polygraft.base.default_model import ensure_default_model
from polygraft.base.loader import load_base
from polygraft.config import ServerConfig
from polygraft.core.spec import BaseSpec
from polygraft.engine.check import CheckReport, check_against, check_folder
from polygraft.engine.engine import Engine
from polygraft.errors import BaseModelError
from tests.adapters.specimen import Specimen
from tests.engines import make_engine
from tests.peft_folders import KINDS
from tests.tiny import CONFIGS, VOCABULARY

SAMPLES = Path(__file__).resolve().parents[2] / "adapters"


def test_a_lora_in_numbers(llama_store: Path, llama: Path) -> None:
    folder = llama_store / "rslora-patterns"
    report = check_folder(folder, ServerConfig(model=str(llama)))
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
        unchecked=("its logits are finite",),
    )
    attention = 2 * 64 * 64 + 2 * 64 * 32
    assert report.base_parameters == 288 * 64 + 3 * (attention + 3 * 64 * 128 + 2 * 64) + 64


def test_a_prefix_in_numbers(llama_store: Path, llama: Path) -> None:
    report = check_folder(llama_store / "prefix", ServerConfig(model=str(llama)))
    assert (report.kind, report.primitives, report.modules) == ("prefix_tuning", ("prefix",), 3)
    assert (report.virtual_tokens, report.rank, report.ranks) == (5, 0, {})
    assert (report.parameters, report.compiled_bytes) == (5 * 2 * 3 * 2 * 16, 4 * 5 * 2 * 3 * 2 * 16)


@pytest.mark.parametrize(
    "settings", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "adapter_dtype": "float32"}]
)
def test_the_memory_is_that_of_the_type_it_is_served_in(
    llama_store: Path, llama: Path, settings: dict[str, str]
) -> None:
    config = ServerConfig(model=str(llama), adapters=llama_store, kv_cache_bytes=2**22, **settings)
    engine = Engine(load_base(str(llama), dtype=config.dtype), config)
    engine.adapters.load_store()
    engine.finish_background()
    for folder in llama_store.iterdir():
        loaded = engine.adapters.registry.get(folder.name)
        assert check_folder(folder, config).compiled_bytes == loaded.compiled_bytes, folder.name


def test_the_checkpoints_own_type_counts(llama_store: Path, tmp_path: Path) -> None:
    def memory(stored: str, **settings: str) -> int:
        model = tmp_path / stored
        if not model.exists():
            LlamaConfig(**CONFIGS["llama"], vocab_size=VOCABULARY, dtype=stored).save_pretrained(model)
        return check_folder(llama_store / "lora", ServerConfig(model=str(model), **settings)).compiled_bytes

    assert memory("float32") == 2 * memory("bfloat16")
    # A CPU computes a float16 checkpoint in float32.
    assert memory("float16") == memory("float32")
    assert memory("bfloat16", dtype="float32") == memory("float32")


def test_the_default_model_isnt_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYGRAFT_CACHE", str(tmp_path / "cache"))
    report = check_folder(SAMPLES / "ticket-lora", ServerConfig())
    assert (report.fits, report.base_parameters) == (True, 134_515_008)
    # Its file is in float32 and the model in bfloat16, which adapters are then kept in.
    assert report.compiled_bytes == 2 * report.parameters
    assert not (tmp_path / "cache").exists()


@pytest.mark.real
def test_the_default_models_configuration_is_the_one_that_converting_writes() -> None:
    written = AutoConfig.from_pretrained(ensure_default_model()).to_diff_dict()
    for name in ("_model_name_or_path", "transformers_version", "unk_token_id"):
        written.pop(name, None)
    assert {**default_config().to_diff_dict(), **written} == default_config().to_diff_dict()


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
    assert report.problems == (f"no such folder in the store: {what}",)


def test_a_base_that_is_none(llama_store: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BaseModelError, match="empty"):
        check_folder(llama_store / "lora", ServerConfig(model=str(tmp_path / "empty")))
