"""Folders that can't be trusted: what isn't an intact adapter inside the store is refused by name."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polygraft.adapters.files.folder import (
    CONFIG,
    MAX_CONFIG_BYTES,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    PICKLES,
    WEIGHTS,
)
from polygraft.adapters.files.store import read_folder
from polygraft.core.names import check_name
from polygraft.core.spec import BaseSpec
from polygraft.errors import AdapterInvalid, InvalidRequest
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


HUGE = b'{"x":{"dtype":"F32","shape":%s,"data_offsets":[0,%d]}}'


@pytest.mark.parametrize(
    "header",
    [
        HUGE % (b"[0,9223372036854775808]", 0),
        HUGE % (b"[9223372036854775807,9223372036854775807]", 4),
        HUGE % (b"[18446744073709551615]", 4),
        HUGE % (b"[1]", 2**63),
        HUGE.replace(b"F32", b"F4") % (b"[1]", 1),
        b"[" * 200_000,
        b'{"x":' * 100_000,
    ],
    ids=range(7),
)
def test_a_header_that_lies(intact: Path, spec: BaseSpec, header: bytes) -> None:
    (intact / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert WEIGHTS in refusal(intact, spec)


def test_a_header_and_a_number_of_tensors_over_the_limits(intact: Path, spec: BaseSpec) -> None:
    header = b"{}" + b" " * MAX_HEADER_BYTES
    (intact / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    assert f"the limit is {MAX_HEADER_BYTES}" in refusal(intact, spec)
    empty = {f"{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(MAX_TENSORS + 1)}
    header = json.dumps(empty).encode()
    (intact / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    assert f"{MAX_TENSORS + 1} tensors, the limit is {MAX_TENSORS}" in refusal(intact, spec)


def test_reading_a_small_file_reserves_little_memory(intact: Path) -> None:
    tracemalloc.start()
    try:
        read_folder("one", intact, 2**33)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("left", [0, 4, 8, 200, -1, -1000])
def test_truncated_weights(intact: Path, spec: BaseSpec, left: int) -> None:
    whole = (intact / WEIGHTS).read_bytes()
    (intact / WEIGHTS).write_bytes(whole[:left])
    assert f"{WEIGHTS} is {'cut short' if left else 'empty'}" in refusal(intact, spec)


def test_weights_with_something_behind_them(intact: Path, spec: BaseSpec) -> None:
    with (intact / WEIGHTS).open("ab") as file:
        file.write(b"more")
    assert f"{WEIGHTS} is cut short or damaged" in refusal(intact, spec)


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
    assert f"{WEIGHTS} is a pickle under another name" in refusal(intact, spec)
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
        (b"", "is empty"),
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
    config = json.dumps({**specimen("lora").config, "use_qalora": 0})
    (intact / CONFIG).write_text(
        config.replace('"use_qalora": 0', '"use_qalora": ' + "[" * depth + "]" * depth)
    )
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
    with pytest.raises(AdapterInvalid) as caught:
        compile_folder(damaged.save(tmp_path / "a"), spec)
    problems = caught.value.problems
    assert len(problems) <= MAX_TEXTS + 1
    assert "forged" in problems[-2]
    assert re.fullmatch(r"and \d+ more", problems[-1])
    assert all(problem.isprintable() and len(problem) <= MAX_CHARACTERS for problem in problems)


# ---- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["", "../x", "a/b", "a@1", "@", ".hidden", "-x", "_x", "a b", "é", "a\n", "a\0", "x" * 129, "x" * 10_000],
)
def test_names_that_no_adapter_can_have(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"name: must match") as caught:
        check_name(name)
    assert len(str(caught.value)) < 400


def test_white_space_around_a_name_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"got 'json '; leave out the white space around it$"):
        check_name("json ")


@pytest.mark.parametrize("name", ["a", "0", "json-v1.2_x", "A" * 128])
def test_names_that_one_can_have(name: str) -> None:
    check_name(name)
