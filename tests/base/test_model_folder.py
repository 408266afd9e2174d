"""What `--model` may name, what is said where it names nothing, and what others see of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from polygraft.base.loader import base_config, load_base
from polygraft.base.model_folder import locate, shown_name
from polygraft.errors import BaseModelError


def refusal(model: str) -> str:
    with pytest.raises(BaseModelError) as caught:
        locate(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "model", ["/no/such", "./models", "../models", "a/b/c", "~/no-such-folder", "models/"]
)
def test_a_path_that_leads_nowhere_isnt_asked_of_the_hub(model: str) -> None:
    assert refusal(model) == f"{model}: no such folder"
    for load in (load_base, base_config):
        with pytest.raises(BaseModelError, match=r"no such folder$"):
            load(model)


@pytest.mark.parametrize("model", ["gpt2", "meta-llama/Llama-3.2-1B"])
def test_a_hub_id(model: str) -> None:
    assert locate(model) == model
    assert shown_name(model) == model


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    assert "the folder has no config.json" in refusal(str(tmp_path))
    (tmp_path / "file").touch()
    assert "is a file" in refusal(str(tmp_path / "file"))
    assert "File name too long" in refusal("x" * 300)


def test_a_folder_that_cant_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", denied)
    assert refusal(str(tmp_path)) == f"{tmp_path}: can't be read by this user: {tmp_path}"


def test_others_see_a_folders_own_name_alone(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown_name("default") == "SmolLM2-135M-Instruct"
    assert shown_name(str(llama)) == shown_name(f"{llama}/") == llama.name
    monkeypatch.chdir(llama)
    assert shown_name(".") == llama.name
    base = load_base(str(llama))
    assert (base.name, base.spec.name) == (llama.name, llama.name)
