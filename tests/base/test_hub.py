"""Models by hub id: from the cache where the hub can't be reached, and refused at once where it isn't there."""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from polygraft.base import hub
from polygraft.base.hub import hub_folder
from polygraft.base.loader import base_config, load_base
from polygraft.errors import BaseModelError


@pytest.fixture
def hub_cache(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the model `team/tiny`, on a machine that reaches no hub."""
    model = tmp_path / "models--team--tiny"
    shutil.copytree(llama, model / "snapshots" / ("0" * 40))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    hub_folder.cache_clear()
    # Port 1 of this machine refuses every connection.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_what_the_cache_holds_is_loaded_without_a_network(hub_cache: Path) -> None:
    started = time.monotonic()
    assert hub_folder("team/tiny") == str(hub_cache / "models--team--tiny" / "snapshots" / ("0" * 40))
    base = load_base("team/tiny")
    assert base.name == "team/tiny"
    assert base_config("team/tiny").model_type == "llama"
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("offline", [False, True])
def test_what_it_lacks_is_refused_at_once_with_what_to_do(
    hub_cache: Path, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    started = time.monotonic()
    for load in (load_base, base_config):
        with pytest.raises(BaseModelError) as caught:
            load("team/other")
        said = str(caught.value)
        assert said.startswith(f"team/other: no such folder here, not in the hub's cache ({hub_cache})")
        assert ("HF_HUB_OFFLINE" in said) == offline
        assert "`--model default`" in said
        assert isinstance(caught.value.__cause__, LocalEntryNotFoundError)
    assert time.monotonic() - started < 20


def test_a_hub_that_never_answers_is_not_waited_for(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert hub_folder("team/tiny").startswith(str(hub_cache))
        with pytest.raises(BaseModelError, match="the hub cannot be reached"):
            hub_folder("team/other")


def test_a_model_is_looked_up_once(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(hub, "_answers", lambda model: bool(asked.append(model)))
    for _ in range(3):
        assert base_config("team/tiny").model_type == "llama"
    assert asked == ["team/tiny"]
