"""Where the cache is; an empty variable is an unset one."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from polygraft.core.cache_dir import cache_dir
from polygraft.errors import ConfigError
from polygraft.layers.native import build

VARIABLES = ("POLYGRAFT_CACHE", "XDG_CACHE_HOME", "HOME")


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_the_variables_in_their_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tmp_path / "home" in cache_dir().parents
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tmp_path / "xdg" in (cache_dir(), *cache_dir().parents)
    monkeypatch.setenv("POLYGRAFT_CACHE", "~/own")
    assert cache_dir() == tmp_path / "home" / "own"
    monkeypatch.setenv("POLYGRAFT_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path


@pytest.mark.parametrize("empty", [(), VARIABLES])
def test_without_any_the_systems_list_of_users_knows(
    monkeypatch: pytest.MonkeyPatch, empty: tuple[str, ...]
) -> None:
    for name in empty:
        monkeypatch.setenv(name, "")
    assert cache_dir() == Path(pwd.getpwuid(os.getuid()).pw_dir) / ".cache" / "polygraft"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    with pytest.raises(ConfigError, match="POLYGRAFT_CACHE: set it to a folder for the cache"):
        cache_dir()
    # The operators in torch need none.
    monkeypatch.setattr(build, "library_name", lambda march: "no-such-library.so")
    assert build.load() is None
    assert "which are slower" in caplog.text
