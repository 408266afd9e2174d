"""Folders that can't be trusted: what isn't an intact adapter inside the store is refused by name."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from polygraft.adapters import folder as folder_module
from polygraft.adapters.folder import (
    CONFIG,
    MAX_CONFIG_BYTES,
    PICKLES,
    WEIGHTS,
    AdapterStore,
    read_folder,
)
from polygraft.adapters.names import check_name
from polygraft.base.spec import BaseSpec
from polygraft.errors import AdapterInvalid, InvalidRequest, PolygraftError
from polygraft.printable import MAX_CHARACTERS, MAX_TEXTS
from tests.adapters.specimen import Specimen, compile_folder

ROOM = 2**30


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.fixture
def intact(specimen: Callable[[str], Specimen], tmp_path: Path) -> Path:
    return specimen("lora").save(tmp_path / "store" / "one")


def refusal(folder: Path, base: BaseSpec) -> str:
    with pytest.raises(AdapterInvalid) as caught:
        compile_folder(folder, base)
    assert caught.value.name == folder.name
    return str(caught.value)


def test_an_intact_folder_is_not_refused(intact: Path, spec: BaseSpec) -> None:
    assert compile_folder(intact, spec).warnings == ()


@pytest.mark.parametrize("left", [0, 4, 8, 200, -1, -1000])
def test_truncated_weights(intact: Path, spec: BaseSpec, left: int) -> None:
    whole = (intact / WEIGHTS).read_bytes()
    (intact / WEIGHTS).write_bytes(whole[:left])
    assert f"{WEIGHTS} can't be read" in refusal(intact, spec)


def test_weights_with_something_behind_them(intact: Path, spec: BaseSpec) -> None:
    with (intact / WEIGHTS).open("ab") as file:
        file.write(b"more")
    assert f"{WEIGHTS} can't be read" in refusal(intact, spec)


@pytest.mark.parametrize("torch_zip", [False, True])
def test_a_pickle_in_place_of_weights_is_never_unpickled(
    intact: Path, spec: BaseSpec, torch_zip: bool
) -> None:
    trace = intact / "trace"
    buffer = io.BytesIO()
    if torch_zip:
        torch.save({"w": torch.zeros(2), "bomb": Bomb(trace)}, buffer)
    else:
        pickle.dump(Bomb(trace), buffer)
    (intact / WEIGHTS).write_bytes(buffer.getvalue())
    assert f"{WEIGHTS} can't be read" in refusal(intact, spec)
    assert not trace.exists()


@pytest.mark.parametrize("name", PICKLES)
def test_a_folder_with_nothing_but_a_pickle(intact: Path, spec: BaseSpec, name: str) -> None:
    trace = intact / "trace"
    (intact / WEIGHTS).unlink()
    (intact / name).write_bytes(pickle.dumps(Bomb(trace)))
    text = refusal(intact, spec)
    assert f"{name} is a pickle" in text
    assert (
        "`polygraft adapters convert FOLDER OUT`, or save the adapter again with safe_serialization=True"
        in text
    )
    assert not trace.exists()


def test_a_pickle_beside_the_weights_is_left_alone(intact: Path, spec: BaseSpec) -> None:
    trace = intact / "trace"
    (intact / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(trace)))
    compile_folder(intact, spec)
    assert not trace.exists()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("how", ["missing", "folder", "pipe"])
def test_a_file_that_is_none(intact: Path, spec: BaseSpec, name: str, how: str) -> None:
    (intact / name).unlink()
    if how == "folder":
        (intact / name).mkdir()
    elif how == "pipe":
        os.mkfifo(intact / name)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    assert name in refusal(intact, spec)
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "is not JSON"),
        (b"r: 8", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a":' * 100_000, "is not JSON"),
        (b'{"r": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"[]", "must hold an object"),
        (b"null", "must hold an object"),
        (b'"LORA"', "must hold an object"),
        (b" " * (MAX_CONFIG_BYTES + 1), f"the limit is {MAX_CONFIG_BYTES}"),
    ],
    ids=lambda value: value[:12] if isinstance(value, bytes) else None,
)
def test_a_config_that_is_none(intact: Path, spec: BaseSpec, text: bytes, why: str) -> None:
    (intact / CONFIG).write_bytes(text)
    text_of_error = refusal(intact, spec)
    assert CONFIG in text_of_error
    assert why in text_of_error
    assert len(text_of_error) < 1000


@pytest.mark.parametrize("depth", [50, 150, 300, 900, 990, 1500, 5000])
def test_a_deeply_nested_config_is_refused_at_any_depth(
    intact: Path, specimen: Callable[[str], Specimen], spec: BaseSpec, depth: int
) -> None:
    config = json.dumps({**specimen("lora").config, "nested": 0})
    (intact / CONFIG).write_text(config.replace('"nested": 0', '"nested": ' + "[" * depth + "]" * depth))
    assert len(refusal(intact, spec)) < 2000


def test_weights_over_the_limit_are_not_read(intact: Path) -> None:
    size = (intact / WEIGHTS).stat().st_size
    read_folder("one", intact, size)
    with pytest.raises(AdapterInvalid, match=rf"{WEIGHTS} has {size} bytes, the limit is {size - 1}"):
        read_folder("one", intact, size - 1)


def test_the_hash_changes_with_config_and_weights_and_not_with_layout(
    intact: Path, specimen: Callable[[str], Specimen]
) -> None:
    def digest() -> str:
        return read_folder("one", intact, ROOM).content_hash

    first = digest()
    config = json.loads((intact / CONFIG).read_text())
    (intact / CONFIG).write_text(json.dumps(dict(reversed(config.items())), indent=7))
    assert digest() == first
    (intact / CONFIG).write_text(json.dumps({**config, "lora_alpha": 9}))
    assert digest() != first
    (intact / CONFIG).write_text(json.dumps(config))
    changed = specimen("lora")
    next(iter(changed.tensors.values()))[0, 0] += 1
    changed.save(intact)
    assert digest() != first


def test_a_folder_of_tens_of_thousands_of_problems(
    specimen: Callable[[str], Specimen], spec: BaseSpec, tmp_path: Path
) -> None:
    damaged = specimen("lora")
    name = "a name\n2026-01-01 00:00:00 INFO forged " + "x" * 1000
    damaged.tensors |= {f"{name}{n}": torch.zeros(1) for n in range(3000)}
    damaged.config["what\nelse"] = "much\nmore" * 1000
    with pytest.raises(AdapterInvalid) as caught:
        compile_folder(damaged.save(tmp_path / "a"), spec)
    problems = caught.value.problems
    assert len(problems) <= MAX_TEXTS + 1
    assert "what\\nelse" in problems[0]
    assert "forged" in problems[-2]
    assert re.fullmatch(r"and \d+ more", problems[-1])
    assert all(problem.isprintable() and len(problem) <= MAX_CHARACTERS for problem in problems)


# ---- the store -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    ["", ".", "./", "..", "../outside", "one/../../outside", "one/..", "/", "/etc", "a\0b", "\0"],
)
def test_sources_that_lead_out_of_the_store(intact: Path, source: str) -> None:
    with pytest.raises(InvalidRequest, match=r"source: must be a folder below the store") as caught:
        AdapterStore(intact.parent, ROOM).read("one", source)
    assert caught.value.field == "source"


def test_a_server_without_a_store(intact: Path) -> None:
    store = AdapterStore(None, ROOM)
    assert store.names() == []
    with pytest.raises(InvalidRequest, match=r"source: this server has no store"):
        store.read("one", "one")


@pytest.mark.parametrize("source", ["nothing", "one/deeper", "x" * 5000, "one/adapter_config.json"])
def test_sources_that_are_no_folder(intact: Path, source: str) -> None:
    with pytest.raises(PolygraftError) as caught:
        AdapterStore(intact.parent, ROOM).read("one", source)
    assert isinstance(caught.value, AdapterInvalid | InvalidRequest)
    assert source[:50] in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("what", ["folder", "deep folder", CONFIG, WEIGHTS])
def test_symlinks_out_of_the_store(intact: Path, tmp_path: Path, what: str) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(intact, outside)
    store = AdapterStore(intact.parent, ROOM)
    source = "one"
    if what == "folder":
        (intact.parent / "link").symlink_to(outside)
        source = "link"
    elif what == "deep folder":
        (intact / "deep").symlink_to(tmp_path)
        source = "one/deep/outside"
    else:
        (intact / what).unlink()
        (intact / what).symlink_to(outside / what)
    with pytest.raises(InvalidRequest, match=rf"source: leads out of the store: '{source}'"):
        store.read("one", source)


def test_a_symlink_to_itself(intact: Path) -> None:
    (intact.parent / "loop").symlink_to("loop")
    with pytest.raises(PolygraftError) as caught:
        AdapterStore(intact.parent, ROOM).read("loop", "loop")
    assert isinstance(caught.value, AdapterInvalid | InvalidRequest)
    assert "loop" in str(caught.value)


def test_symlinks_inside_the_store_are_fine(intact: Path) -> None:
    (intact.parent / "same").symlink_to(intact)
    store = AdapterStore(intact.parent, ROOM)
    assert store.read("x", "same").content_hash == store.read("x", "one").content_hash
    assert store.names() == ["one", "same"]


def test_a_store_behind_a_symlink_is_fine(intact: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(intact.parent)
    assert AdapterStore(tmp_path / "alias", ROOM).read("x", "one").name == "x"


def test_names_are_those_of_visible_folders(intact: Path) -> None:
    for name in (".hidden", "__pycache__", "deep"):
        (intact.parent / name).mkdir()
    (intact.parent / "README.md").write_text("text")
    assert AdapterStore(intact.parent, ROOM).names() == ["deep", "one"]


HOSTILE = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(["..", ".", "", "one", "out", "in", "~", "\\", "\0", "a" * 300]), max_size=6
    ).map("/".join),
)


@given(source=HOSTILE)
@example(source="out/two")
@example(source="in")
@example(source="one/out")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_source_nothing_outside_the_store_is_opened(intact: Path, source: str) -> None:
    root = intact.parent
    outside = root.parent / "outside"
    if not outside.exists():
        shutil.copytree(intact, outside / "two")
        (root / "out").symlink_to(outside)
        (root / "in").symlink_to(intact)
        (intact / "out").symlink_to(outside / "two")
    opened: list[Path] = []
    real = os.open

    def note(path: Any, *args: Any, **kwargs: Any) -> int:
        opened.append(Path(path))
        return real(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_module.os, "open", note)
        try:
            AdapterStore(root, ROOM).read("any", source)
        except (AdapterInvalid, InvalidRequest):
            pass
        else:
            assert opened, "it was read some other way"
    assert all(path.resolve().is_relative_to(root.resolve()) for path in opened)


# ---- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["", "../x", "a/b", "a@1", "@", ".hidden", "-x", "_x", "a b", "é", "a\n", "a\0", "x" * 129, "x" * 10_000],
)
def test_names_that_no_adapter_can_have(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"name: must match") as caught:
        check_name(name)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["a", "0", "json-v1.2_x", "A" * 128])
def test_names_that_one_can_have(name: str) -> None:
    check_name(name)
