"""`polygraft serve` hands settled settings to the server."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from polygraft.cli.serve import read_config
from polygraft.config import ServerConfig

from .conftest import Invoke


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServerConfig]:
    """The configs that a stand-in for the server was run with; it ends with status 3."""
    configs: list[ServerConfig] = []
    stand_in = ModuleType("polygraft.server")
    stand_in.run = lambda config: configs.append(config) or 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "polygraft.server", stand_in)
    return configs


def test_settings_and_status_pass_through(invoke: Invoke, served: list[ServerConfig], tmp_path: Path) -> None:
    flags = ["--adapters", tmp_path, "--kv-cache-bytes", "2MiB", "--listen=127.0.0.1:0"]
    result = invoke("serve", *flags, env={"POLYGRAFT_MAX_NUM_SEQS": "7"})
    assert result.exit_code == 3
    (config,) = served
    assert (config.adapters, config.kv_cache_bytes, config.listen) == (tmp_path, 2**21, "127.0.0.1:0")
    assert config.max_num_seqs == 7


def test_a_wrong_setting_starts_nothing(invoke: Invoke, served: list[ServerConfig]) -> None:
    assert invoke("serve", "--dtype", "int3").exit_code == 2
    assert served == []


def test_settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "polygraft.toml"
    file.write_text('dtype = "float32"\nblock_size = 8\n')
    monkeypatch.setenv("POLYGRAFT_CONFIG", str(file))
    config = read_config(["--block-size", "4"])
    assert (config.dtype, config.block_size) == ("float32", 4)
