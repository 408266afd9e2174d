"""The first thing that is said of a folder that can't be served is what it most probably is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from polygraft.adapters.files.folder import CONFIG, WEIGHTS
from polygraft.adapters.files.store import AdapterStore, read_folder
from polygraft.core.spec import BaseSpec
from polygraft.errors import SHOWN_PROBLEMS, AdapterInvalid
from tests.adapters.specimen import Specimen, compile_folder

Change = Callable[[Specimen], None]


def renamed(old: str, new: str) -> Change:
    def change(adapter: Specimen) -> None:
        adapter.tensors = {name.replace(old, new): tensor for name, tensor in adapter.tensors.items()}

    return change


def resized(size: int) -> Change:
    """As for a base of another hidden size."""

    def change(adapter: Specimen) -> None:
        for name, tensor in adapter.tensors.items():
            if "lora_A" in name and tensor.shape[1] == 64:
                adapter.tensors[name] = torch.ones(tensor.shape[0], size)
            elif "lora_B" in name and tensor.shape[0] == 64:
                adapter.tensors[name] = torch.ones(size, tensor.shape[1])

    return change


def more_layers(adapter: Specimen) -> None:
    for name in [*adapter.tensors]:
        if ".layers.0." in name:
            adapter.tensors[name.replace(".layers.0.", ".layers.31.")] = adapter.tensors[name].clone()


def emptied(adapter: Specimen) -> None:
    adapter.tensors = {name: torch.ones(0) for name in adapter.tensors}


def whole_model(adapter: Specimen) -> None:
    adapter.tensors = {f"model.layers.{i}.self_attn.q_proj.weight": torch.ones(64, 64) for i in range(3)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (resized(32), "made for hidden size 32; the base has 64"),
        (more_layers, "made for a base of at least 32 layers; this one has 3"),
        (renamed(".weight", ".default.weight"), "saved by an older trainer, or from the model's state dict: keys carry `.default`"),
        (renamed("base_model.model.", ""), "saved by another library than PEFT: keys lack `base_model.model.`"),
        (renamed("base_model.", "module.base_model."), "saved from a model wrapped by DistributedDataParallel"),
        (renamed("base_model.", "_orig_mod.base_model."), "saved from a model wrapped by torch.compile"),
        (renamed("model.layers.", "transformer.h."), "made for another architecture: none of its modules, such as"),
        (emptied, "its tensors are empty, as DeepSpeed ZeRO-3 saves them"),
        (whole_model, "its file holds a full model's weights, not an adapter's"),
    ],
)  # fmt: skip
def test_what_the_tensors_show_comes_first(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path, change: Change, says: str
) -> None:
    adapter = specimen("lora")
    change(adapter)
    with pytest.raises(AdapterInvalid) as caught:
        compile_folder(adapter.save(tmp_path / "a"), spec)
    error = caught.value
    assert error.problems[0].startswith(says)
    assert error.total > SHOWN_PROBLEMS
    assert str(error).count(";") < 12
    assert str(error).endswith(f"and {error.total - SHOWN_PROBLEMS} more")
    assert len(str(error)) < 1000


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        (WEIGHTS, LFS, "is a Git LFS pointer, not the file: run `git lfs pull`"),
        (CONFIG, LFS, "is a Git LFS pointer"),
        (WEIGHTS, b"<!DOCTYPE html><html>not found</html>", "is a web page, not the file"),
        (CONFIG, b"<html>", "is a web page, not the file"),
        (WEIGHTS, b"", "is empty"),
        (WEIGHTS, b"PK\x03\x04" + b"\0" * 40, "is a pickle under another name"),
    ],
)
def test_what_a_file_is_instead(
    specimen: Callable[[str], Specimen], tmp_path: Path, file: str, content: bytes, says: str
) -> None:
    folder = specimen("lora").save(tmp_path / "a")
    (folder / file).write_bytes(content)
    with pytest.raises(AdapterInvalid) as caught:
        read_folder("a", folder, 2**30)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{file} {says}")


def test_a_header_that_begins_like_a_pickle_is_none(
    specimen: Callable[[str], Specimen], tmp_path: Path
) -> None:
    adapter = specimen("lora")
    folder = adapter.save(tmp_path / "a")
    content = (folder / WEIGHTS).read_bytes()
    header = int.from_bytes(content[:8], "little")
    longer = (header | 0xFF) + 1 + 0x80  # its lowest byte is 0x80, a pickle's first
    longer += (0x02 - (longer >> 8)) % 256 << 8  # and the next one its protocol
    padded = longer.to_bytes(8, "little") + content[8 : 8 + header].ljust(longer) + content[8 + header :]
    assert padded[:2] == b"\x80\x02"
    (folder / WEIGHTS).write_bytes(padded)
    assert read_folder("a", folder, 2**30).take_tensors().keys() == adapter.tensors.keys()


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["checkpoint-500/adapter_config.json", "checkpoint-900/adapter_config.json"], "is in its sub-folders: checkpoint-500, checkpoint-900"),
        (["snapshots/abc/adapter_config.json"], "is in its sub-folders: snapshots/abc"),
        (["config.json", "model.safetensors"], "it is a model's folder, not an adapter's"),
        (["adapter_model.safetensors"], "copy it from where adapter_model.safetensors comes from"),
        (["notes.txt"], "this is no adapter's folder"),
    ],
)  # fmt: skip
def test_a_folder_without_a_configuration(tmp_path: Path, files: list[str], says: str) -> None:
    for file in files:
        (tmp_path / "one" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "one" / file).write_text("{}")
    with pytest.raises(AdapterInvalid) as caught:
        AdapterStore(tmp_path, 2**30).read("one", "one")
    (problem,) = caught.value.problems
    assert problem.startswith("adapter_config.json is missing")
    assert says in problem
