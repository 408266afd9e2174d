"""`polygraft adapters convert`: pickles of tensors become safetensors, and anything else stays what it is."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from polygraft.adapters.files.convert import convert_folder
from polygraft.adapters.files.folder import CONFIG, WEIGHTS
from polygraft.adapters.files.store import read_folder
from polygraft.adapters.files.unpickle import read_tensors
from polygraft.core.spec import BaseSpec
from polygraft.errors import AdapterInvalid, ConfigError
from tests.adapterhub.library import FIXTURES
from tests.adapters.files.test_folder import Bomb
from tests.adapters.specimen import Specimen, compile_folder

PICKLES = FIXTURES / "llama-pickles"
Tensors = dict[str, Any]


@pytest.fixture
def pickled(specimen: Callable[[str], Specimen], tmp_path: Path) -> Callable[..., Path]:
    """A PEFT folder with a pickle in the place of its weights."""

    def make(content: Any = None, file: str = "adapter_model.bin") -> Path:
        intact = specimen("lora")
        folder = intact.save(tmp_path / "old")
        (folder / WEIGHTS).unlink()
        torch.save(intact.tensors if content is None else content, folder / file)
        return folder

    return make


def test_a_folder_of_peft(
    pickled: Callable[..., Path], specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    old = pickled()
    (old / "tokenizer.json").write_text("{}")
    (old / "README.md").write_text("text")
    done = convert_folder(old, tmp_path / "deep" / "new")
    new = Path(done.folder)
    assert sorted(path.name for path in new.iterdir()) == [CONFIG, WEIGHTS, "tokenizer.json"]
    assert (done.pickle, done.weights, done.bytes) == (
        "adapter_model.bin",
        WEIGHTS,
        (new / WEIGHTS).stat().st_size,
    )
    tensors = load_file(new / WEIGHTS)
    assert done.tensors == len(tensors)
    for name, tensor in specimen("lora").tensors.items():
        assert torch.equal(tensors[name], tensor)
    assert (new / CONFIG).read_bytes() == (old / CONFIG).read_bytes()
    (new / "tokenizer.json").unlink()
    compile_folder(new, spec)


@pytest.mark.parametrize("key", ["mam", "ln_before"])
def test_a_folder_of_adapterhub(tmp_path: Path, key: str) -> None:
    """One of each group of names for a tensor is kept, as in the fixtures."""
    convert_folder(PICKLES / key, tmp_path / "new")
    ours = load_file(tmp_path / "new" / "adapter.safetensors")
    theirs = load_file(FIXTURES / "llama" / key / "adapter.safetensors")
    saved = torch.load(PICKLES / key / "pytorch_adapter.bin", weights_only=True)
    assert len(saved) > len(theirs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    read_folder("new", tmp_path / "new", 2**20)


def test_shared_tensors_of_peft_are_copied(
    pickled: Callable[..., Path], specimen: Callable[[str], Specimen], tmp_path: Path
) -> None:
    whole = torch.arange(24.0).view(4, 6)
    tensors = {"a": whole, "b": whole, "view": whole[1:3, ::2], "turned": whole.T}
    convert_folder(pickled(tensors), tmp_path / "new")
    new = load_file(tmp_path / "new" / WEIGHTS)
    assert all(torch.equal(new[name], tensors[name]) for name in tensors)


def refusal(folder: Path, out: Path, **limits: int) -> str:
    with pytest.raises(AdapterInvalid) as caught:
        convert_folder(folder, out, **limits)
    assert not out.exists()
    assert not list(out.parent.glob(".converting-*"))
    return str(caught.value)


def test_code_is_not_run(pickled: Callable[..., Path], tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    folder = pickled({"w": torch.zeros(2), "bomb": Bomb(trace)})
    assert "adapter_model.bin can't be read as tensors alone" in refusal(folder, tmp_path / "new")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(trace)))
    assert "adapter_model.bin can't be read as tensors alone" in refusal(folder, tmp_path / "new")
    assert not trace.exists()


CONTENTS: list[tuple[Any, str]] = [
    ([torch.zeros(2)], "holds a list, not tensors by name"),
    ({}, "holds a dict, not tensors by name"),
    (torch.zeros(2), "holds a Tensor, not tensors by name"),
    ({"a": 1}, "holds a int under 'a', not a tensor"),
    ({"state_dict": {"a": torch.zeros(2)}}, "holds a dict under 'state_dict', not a tensor"),
    ({3: torch.zeros(2)}, "holds a Tensor under '3', not a tensor"),
    ({"a": torch.zeros(2).to_sparse()}, "holds a Tensor under 'a', not a tensor"),
    # A file of a few bytes that stands for many.
    ({"a": torch.zeros(1).expand(2**40)}, "have 4398046511104 bytes, the limit is 1048576"),
]


def unreadable(file: Path, limit: int = 2**20) -> str:
    """Why the other process doesn't take a file, asked in this one."""
    with pytest.raises(AdapterInvalid) as caught:
        read_tensors(file, limit, keep_aliases=True)
    return str(caught.value)


@pytest.mark.parametrize(("content", "text"), CONTENTS, ids=[text for _, text in CONTENTS])
def test_contents_that_are_no_tensors_by_name(tmp_path: Path, content: Any, text: str) -> None:
    torch.save(content, tmp_path / "file")
    assert text in unreadable(tmp_path / "file")


@pytest.mark.parametrize("first", [0, 1, 100])
@pytest.mark.parametrize("last", [0, 50, -1, -100])
def test_broken_files(tmp_path: Path, first: int, last: int) -> None:
    torch.save({"a": torch.zeros(300)}, tmp_path / "file")
    whole = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(whole[first:last])
    assert "file can't be read as tensors alone" in unreadable(tmp_path / "file")


def test_limits(pickled: Callable[..., Path], tmp_path: Path) -> None:
    assert "bytes, the limit is 1000" in refusal(pickled(), tmp_path / "new", max_bytes=1000)


def test_folders_without_a_pickle(
    pickled: Callable[..., Path], specimen: Callable[[str], Specimen], tmp_path: Path
) -> None:
    intact = specimen("lora").save(tmp_path / "intact")
    assert f"it has {WEIGHTS}, so there is nothing to convert" in refusal(intact, tmp_path / "new")
    (intact / WEIGHTS).unlink()
    assert "so there is nothing to convert" in refusal(intact, tmp_path / "new")
    (intact / CONFIG).unlink()
    assert f"{CONFIG} is missing" in refusal(intact, tmp_path / "new")
    (intact / CONFIG).write_text("[]")
    assert f"{CONFIG} must hold an object" in refusal(intact, tmp_path / "new")


def test_a_head_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(PICKLES / "mam", folder)
    (folder / "head_config.json").write_text("{}")
    assert "it brings a head of its own" in refusal(folder, tmp_path / "new")


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_there_is_not_overwritten(pickled: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    out = tmp_path / "new"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"OUT: .* exists already"):
        convert_folder(pickled(), out)
    assert out.is_symlink() or out.is_dir() or out.read_text() == "mine"


def test_the_command(pickled: Callable[..., Path], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from polygraft.cli.app import app

    arguments = ["adapters", "convert", str(pickled()), str(tmp_path / "new"), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["folder"] == str(tmp_path / "new")
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    nothing = CliRunner().invoke(app, ["adapters", "convert", str(empty), str(tmp_path / "other")])
    assert nothing.exit_code == 1
    assert f"{CONFIG} is missing" in nothing.stderr
