"""Whether an adapter's base is the served one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from polygraft.base.default_model import FOLDER_NAME, HUB_ID
from polygraft.base.identity import is_same_base


@pytest.mark.parametrize(
    ("trained_on", "name"),
    [
        (HUB_ID, HUB_ID),
        ("SmolLM2-135M-Instruct", HUB_ID),
        (f"/home/anybody/.cache/polygraft/models/{FOLDER_NAME}", HUB_ID),
        (f"/cache/hub/models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/{'0' * 40}/", HUB_ID),
        ("unsloth/Llama-3.2-1B-bnb-4bit", "meta-llama/Llama-3.2-1B"),
        ("unsloth/llama-3.2-1b-unsloth-bnb-4bit", "meta-llama/Llama-3.2-1B"),
        ("C:/models/x/Llama-3.2-1B/", "Llama-3.2-1B"),
    ],
)
def test_the_same_by_name(trained_on: str, name: str) -> None:
    assert is_same_base(trained_on, name, "")


@pytest.mark.parametrize(
    ("trained_on", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M", HUB_ID),
        ("meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-1B"),
        ("/models/other\0", HUB_ID),
    ],
)
def test_another_one(trained_on: str, name: str, tmp_path: Path) -> None:
    assert not is_same_base(trained_on, name, str(tmp_path))


@pytest.fixture
def copies(tmp_path: Path, llama: Path) -> tuple[Path, Path]:
    base, renamed = tmp_path / "base", tmp_path / "renamed"
    shutil.copytree(llama, base)
    shutil.copytree(llama, renamed)
    config = json.loads((renamed / "config.json").read_text())
    (renamed / "config.json").write_text(json.dumps(config | {"transformers_version": "4.0"}))
    return base, renamed


def test_the_same_by_content(copies: tuple[Path, Path], tmp_path: Path) -> None:
    base, renamed = copies
    assert is_same_base(str(renamed), base.name, str(base))
    (tmp_path / "link").symlink_to(base)
    assert is_same_base(str(tmp_path / "link"), base.name, str(base))


@pytest.mark.parametrize("what", ["config", "vocabulary", "weights", "elsewhere", "nothing", "a pipe"])
def test_other_content(copies: tuple[Path, Path], tmp_path: Path, what: str) -> None:
    base, renamed = copies
    match what:
        case "config":
            config = json.loads((renamed / "config.json").read_text())
            (renamed / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
        case "vocabulary":
            (renamed / "tokenizer.json").write_text((renamed / "tokenizer.json").read_text() + " ")
        case "weights":
            with (renamed / "model.safetensors").open("ab") as file:
                file.write(b" ")
        case "a pipe":
            (renamed / "config.json").unlink()
            os.mkfifo(renamed / "config.json")
        case "elsewhere":  # an adapter must not have files read wherever it names them
            (tmp_path / "further").mkdir()
            base = base.rename(tmp_path / "further" / "base")
        case _:
            shutil.rmtree(renamed)
    assert not is_same_base(str(renamed), base.name, str(base))
