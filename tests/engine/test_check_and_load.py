"""`polygraft adapters check` and a server's load say the same of a folder, whatever is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from polygraft.adapters.files.folder import CONFIG, WEIGHTS
from polygraft.base.tokenizer import TOKENIZER
from polygraft.config import ServerConfig
from polygraft.engine.check import CheckReport, check_folder
from polygraft.engine.engine import Engine
from polygraft.engine.load_engine import load_engine
from polygraft.errors import AdapterInvalid, InvalidRequest
from polygraft_types.adapters import AdapterState
from tests.engine.stores import copy_of, load, start_unload
from tests.engines import make_engine

KINDS = ("lora", "prefix", "prompt", "ia3", "shira")
SETTINGS: dict[str, Any] = {"max_adapter_rank": 8, "max_virtual_tokens": 40, "max_context_length": 48}
ONE = '[{"name": "default", "template": "%s"}]'

Change = Callable[[Path, Path], None]
"""Takes a folder, and another that is outside the store."""


def config(**options: object) -> Change:
    def apply(folder: Path, outside: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **options}))

    return apply


def write(file: str, content: str | bytes) -> Change:
    def apply(folder: Path, outside: Path) -> None:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())

    return apply


def link(file: str, to: str) -> Change:
    """Have a file be a link, to a copy of it elsewhere."""

    def apply(folder: Path, outside: Path) -> None:
        target = (outside if to == "outside" else folder.parent / ".kept") / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if (folder / file).exists():
            (folder / file).rename(target)
        else:
            target.write_text("{}")
        (folder / file).symlink_to(os.path.relpath(target, folder) if to == "inside" else target)

    return apply


def link_folder(folder: Path, outside: Path) -> None:
    shutil.rmtree(outside, ignore_errors=True)
    folder.rename(outside)
    folder.symlink_to(outside)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def apply(folder: Path, outside: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return apply


def shorten(file: str) -> Change:
    return lambda folder, outside: os.truncate(folder / file, (folder / file).stat().st_size // 2)


CHANGES: dict[str, Change] = {
    "nothing": lambda folder, outside: None,
    "a link inside": link(WEIGHTS, "inside"),
    "a link out": link(WEIGHTS, "outside"),
    "a configuration out": link(CONFIG, "outside"),
    "a tokenizer out": link("tokenizer_config.json", "outside"),
    "a folder out": link_folder,
    "one template of several": write("tokenizer_config.json", '{"chat_template": %s}' % (ONE % "{{ 1 }}")),
    "no default template": write(
        "tokenizer_config.json", '{"chat_template": [{"name": "a", "template": "b"}]}'
    ),
    "a template": write("chat_template.jinja", "{% for m in messages %}{{ m.content }}{% endfor %}"),
    "bytes for a template": write("chat_template.jinja", b"\xff\xfe"),
    "a broken tokenizer": write(TOKENIZER, "{"),
    "a tokenizer of nothing": write(TOKENIZER, "{}"),
    "a list for a configuration": write("tokenizer_config.json", "[]"),
    "an unknown end": write("special_tokens_map.json", '{"eos_token": "<nowhere>"}'),
    "a rank over the limit": config(r=9),
    "ranks over the limit": config(rank_pattern={"q_proj": 9}),
    "a missing target": config(target_modules=["q_proj", "nowhere"]),
    "modules to save": config(modules_to_save=["score"]),
    "an unknown option": config(merge_weights=True),
    "another": config(enable_lora=[True]),
    "QA-LoRA": config(use_qalora=True),
    "virtual tokens over the limit": config(num_virtual_tokens=41),
    "tokens of an invocation": config(alora_invocation_tokens=[7] * 39),
    "more than the context": config(alora_invocation_tokens=[7] * 41),
    "another base": config(base_model_name_or_path="someone/else\n"),
    "half the weights": shorten(WEIGHTS),
    "half the configuration": shorten(CONFIG),
    "a tensor more": tensors(lambda t: t.update(more=torch.zeros(1))),
    "a tensor less": tensors(lambda t: t.popitem()),
    "infinity": tensors(lambda t: next(iter(t.values())).view(-1)[:1].fill_(torch.inf)),
    "a pickle": lambda folder, outside: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
    "a pipe": lambda folder, outside: os.mkfifo(folder / "chat_template.jinja"),
}


@pytest.fixture(scope="module")
def store(adapter_store: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of(adapter_store("llama"), tmp_path_factory.mktemp("check") / "store", *KINDS)


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[[str], Path], store: Path) -> Engine:
    model = str(tiny_model("llama"))
    settings = ServerConfig(
        model=model, adapters=store, kv_cache_bytes=4 * 2**20, merged_bytes=2**30, **SETTINGS
    )
    return load_engine(settings)


def report_of(folder: Path, model: Path) -> CheckReport:
    return check_folder(folder, ServerConfig(model=str(model), **SETTINGS))


def check_alike(engine: Engine, folder: Path, model: Path) -> CheckReport:
    """Check a folder and load it; the report, if both say the same."""
    report = report_of(folder, model)
    try:
        info = load(engine, folder.name)
    except (AdapterInvalid, InvalidRequest) as error:
        problems = error.problems if isinstance(error, AdapterInvalid) else (str(error),)
        assert report.problems == problems
        assert not report.fits
    else:
        assert info.state is AdapterState.READY
        assert report.problems == ()
        assert report.fits
        # That it changes nothing only a run tells.
        assert report.warnings == tuple(
            one for one in info.warnings if not one.startswith("it changes nothing")
        )
        start_unload(engine, folder.name).result(0)
    return report


@pytest.mark.parametrize("change", CHANGES)
def test_check_says_what_loading_says(
    engine: Engine, store: Path, llama: Path, tmp_path: Path, change: str
) -> None:
    for kind in KINDS:
        folder = Path(shutil.copytree(store / kind, store / f"changed-{kind}"))
        try:
            CHANGES[change](folder, tmp_path / kind)
            check_alike(engine, folder, llama)
        finally:
            folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
            shutil.rmtree(store / ".kept", ignore_errors=True)


@given(
    st.sampled_from(KINDS),
    st.lists(st.sampled_from(sorted(CHANGES)), min_size=2, max_size=3, unique=True),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_changed_both_say_the_same(
    engine: Engine, store: Path, llama: Path, tmp_path: Path, kind: str, changes: list[str]
) -> None:
    outside = tmp_path / "outside"
    shutil.rmtree(outside, ignore_errors=True)
    folder = Path(shutil.copytree(store / kind, store / "changed"))
    try:
        for change in changes:
            try:
                CHANGES[change](folder, outside)
            except (OSError, ValueError, RuntimeError, StopIteration):
                return  # what one has broken the next can't change
            except Exception as error:
                if type(error).__name__ != "SafetensorError":
                    raise
                return
        check_alike(engine, folder, llama)
    finally:
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
        shutil.rmtree(store / ".kept", ignore_errors=True)


def test_what_only_a_server_can_tell_is_said(
    store: Path, llama: Path, adapter_store: Callable[[str], Path]
) -> None:
    assert report_of(store / "lora", llama).unchecked == ("its logits are finite",)
    assert "its virtual tokens fit the KV cache" in report_of(store / "prefix", llama).unchecked
    assert "a merged copy of it fits --merged-bytes" in report_of(store / "shira", llama).unchecked
    hra = report_of(adapter_store("llama") / "hra", llama)
    assert "what it computes from the base's weights is finite" in hra.unchecked
    rows = report_of(adapter_store("llama") / "trainable-tokens", llama)
    assert "its rows of tokens go with the base's weights" in rows.unchecked


def test_a_merged_copy_that_cant_fit(store: Path, llama: Path) -> None:
    settings = ServerConfig(model=str(llama), merged_bytes=1000)
    (problem,) = check_folder(store / "shira", settings).problems
    assert "--merged-bytes allows 1000" in problem
    engine = make_engine(llama, store, merged_bytes=1000)
    assert "--merged-bytes allows 1000" in engine.adapters.registry.get("shira").problems[0]


def test_without_the_bases_tokenizer_that_is_said(
    store: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(store / "lora", tmp_path / "lora"))
    (folder / "chat_template.jinja").write_text("x")
    assert report_of(folder, llama).unchecked == ("its logits are finite",)
    monkeypatch.setattr("polygraft.engine.check.local_tokenizer", lambda model: None)
    assert report_of(folder, llama).unchecked[0].startswith("its tokenizer and chat template can be used")
