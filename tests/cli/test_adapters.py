"""`polygraft adapters` against a scripted server, and its check, which needs none."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

from polygraft.cli import options
from polygraft.config import ServerConfig
from polygraft_api.v1 import adapters_pb2
from tests.client.scripted import Script, adapter

from .conftest import Invoke


@pytest.fixture
def mixed(script: Script) -> Script:
    """A registry with one of each sort."""
    script.page_size = 2
    script.adapters = [
        adapter("headline", running_requests=4),
        adapter("mood", kind="p_tuning", rank=0, virtual_tokens=16, warnings=["changes nothing"]),
        adapter(
            "odd [red]name",
            state=adapters_pb2.ADAPTER_STATE_FAILED,
            problems=["q_proj: rank 8, expected 4"],
        ),
    ]
    return script


def test_list(call: Invoke, mixed: Script) -> None:
    result = call("adapters", "list")
    assert result.exit_code == 0
    rows = {
        name: next(line for line in result.stdout.splitlines() if name in line)
        for name in ("headline", "mood")
    }
    assert all(cell in rows["headline"] for cell in ("ready", "lora", "rank 8", "1.8 MB", "4"))
    assert all(cell in rows["mood"] for cell in ("p_tuning", "16 virtual tokens"))
    assert "mood: changes nothing" in result.stdout
    assert "odd [red]name" in result.stdout
    assert "q_proj: rank 8, expected 4" in result.stdout


@pytest.mark.parametrize("columns", [80, 120])
def test_a_narrow_list_has_every_name_and_every_reason(
    call: Invoke, script: Script, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(options, "PIPED_WIDTH", columns)
    long = "customer-4711-sentiment-of-support-tickets-in-german-2026-11-30-final-v2"
    problems = [
        "made for hidden size 64; the base has 576",
        *(f"tensor {i} has shape [8, 64]" for i in range(124)),
    ]
    failed = adapters_pb2.ADAPTER_STATE_FAILED
    script.adapters = [
        adapter(long, kind="adalora", rank=256), adapter("other", state=failed, problems=problems),
        adapter("prefix", kind="prefix_tuning", virtual_tokens=1024, running_requests=12),
    ]  # fmt: skip
    shown = call("adapters", "list").stdout
    assert max(map(len, shown.splitlines())) <= columns
    assert "…" not in shown
    assert long in shown.replace("\n", "").replace(" ", "") or long in "".join(
        line.split("  ")[0].strip() for line in shown.splitlines()
    )
    assert "3 adapters, 1 failed to load" in shown
    assert "other: made for hidden size 64; the base has 576 (124 more:" in " ".join(shown.split())
    assert len(shown.splitlines()) < 20
    everything = call("adapters", "show", "other").stdout
    assert "and 121 more; --json shows them" in " ".join(everything.split())
    assert len(json.loads(call("adapters", "show", "other", "--json").stdout)["problems"]) == 125


def test_list_as_json(call: Invoke, mixed: Script) -> None:
    found = json.loads(call("adapters", "list", "--json").stdout)
    assert [a["name"] for a in found] == ["headline", "mood", "odd [red]name"]
    assert found[0]["state"] == "READY"
    assert found[0]["load_time"] == "2023-11-14T22:13:20+00:00"


def test_show(call: Invoke, mixed: Script) -> None:
    near = [
        adapters_pb2.NearestToken(token_id=4, text=" joy", similarity=0.5),
        adapters_pb2.NearestToken(token_id=5, text="[bold]", similarity=0.25),
    ]
    mixed.nearest = [adapters_pb2.NearestTokens(tokens=near)]
    shown = call("adapters", "show", "mood", "--nearest", 2).stdout
    assert mixed.requests[-1].nearest_tokens == 2
    for part in ("p_tuning", "changes nothing", "ab" * 32, "in 0.25 s", "' joy' (0.50), '[bold]' (0.25)"):
        assert part in shown


def test_one_that_is_served_merged_only(call: Invoke, script: Script) -> None:
    copy = adapters_pb2.MergedCopy(state=adapters_pb2.MERGE_STATE_READY, memory_bytes=1000, dtype="float32")
    script.adapters = [adapter("waves", kind="fourierft", mergeable=True, merged_only=True, merged=copy)]
    assert "only, ready" in call("adapters", "list").stdout
    shown = call("adapters", "show", "waves").stdout
    assert "on a merged copy only" in shown
    assert "only, ready; 1.0 kB in float32" in shown
    assert json.loads(call("adapters", "show", "waves", "--json").stdout)["merged_only"] is True


def test_show_unknown(call: Invoke) -> None:
    result = call("adapters", "show", "nobody")
    assert (result.exit_code, result.stderr) == (1, "error: adapter 'nobody': not registered\n")


def test_load_and_reload(call: Invoke, script: Script) -> None:
    assert "folder/new" in call("adapters", "load", "new", "folder/new").stdout
    assert script.requests[-1] == adapters_pb2.LoadAdapterRequest(name="new", source="folder/new")
    assert json.loads(call("adapters", "reload", "new", "--json").stdout)["generation"] == 4


def test_unload(call: Invoke, script: Script) -> None:
    assert call("adapters", "unload", "mood").stdout == "mood is unloaded\n"
    assert script.requests[-1].mode == adapters_pb2.UNLOAD_MODE_WAIT
    call("adapters", "unload", "mood", "--no-wait")
    assert script.requests[-1].mode == adapters_pb2.UNLOAD_MODE_REFUSE


@pytest.mark.parametrize("way", ["flag", "variable"])
def test_token(call: Invoke, script: Script, way: str) -> None:
    if way == "flag":
        call("adapters", "list", "--token", "sesame")
    else:
        call("adapters", "list", env={"POLYGRAFT_ADMIN_TOKEN": "sesame"})
    assert script.metadata["authorization"] == "Bearer sesame"


@dataclass(frozen=True)
class Report:
    """What a check returns, as far as it is shown."""

    folder: Path
    fits: bool
    kind: str = "lora"
    primitives: tuple[str, ...] = ("low_rank",)
    modules: int = 60
    rank: int = 8
    ranks: dict[int, int] = field(default_factory=lambda: {4: 20, 8: 40})
    virtual_tokens: int = 0
    parameters: int = 921_600
    base_parameters: int = 134_515_008
    share_of_base: float = 921_600 / 134_515_008
    disk_bytes: int = 1_850_000
    compiled_bytes: int = 1_843_200
    merged_only: bool = False
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ("its logits are finite",)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for the check, which imports torch."""
    stand_in = ModuleType("polygraft.engine.check")
    stand_in.check_folder = lambda folder, config: Report(str(folder), fits=config.model != "other")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "polygraft.engine.check", stand_in)
    return stand_in


def test_check(invoke: Invoke, checks: ModuleType, tmp_path: Path) -> None:
    result = invoke("adapters", "check", tmp_path)
    assert result.exit_code == 0
    for part in ("yes", "4 on 20 modules, 8 on 40 modules", "921,600 (0.685% of", "1.8 MB"):
        assert part in result.stdout


def test_check_of_one_that_would_be_served_merged_only(
    invoke: Invoke, checks: ModuleType, tmp_path: Path
) -> None:
    checks.check_folder = lambda folder, config: Report(str(folder), fits=True, merged_only=True)  # type: ignore[attr-defined]
    assert "on a merged copy only" in invoke("adapters", "check", tmp_path).stdout


def test_check_takes_the_servers_settings(
    invoke: Invoke, checks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ServerConfig] = []
    checks.check_folder = lambda folder, config: seen.append(config) or Report(str(folder), fits=True)  # type: ignore[attr-defined]
    (tmp_path / "polygraft.toml").write_text("max_adapter_rank = 8\n")
    monkeypatch.setenv("POLYGRAFT_MODEL", "from-a-variable")
    flags = ["--dtype", "bfloat16", "--adapter-dtype", "float32", "--config", tmp_path / "polygraft.toml"]
    assert invoke("adapters", "check", tmp_path, *flags).exit_code == 0
    (config,) = seen
    assert (config.model, config.dtype, config.adapter_dtype) == ("from-a-variable", "bfloat16", "float32")
    assert config.max_adapter_rank == 8
    wrong = invoke("adapters", "check", tmp_path, "--dtype", "int3")
    assert (wrong.exit_code, wrong.stderr.startswith("error: --dtype: ")) == (2, True)


def test_check_that_fails(invoke: Invoke, checks: ModuleType, tmp_path: Path) -> None:
    result = invoke("adapters", "check", tmp_path, "--model", "other", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["fits"] is False
    assert json.loads(result.stdout)["folder"] == str(tmp_path)
