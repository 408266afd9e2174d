"""Whatever bytes a folder holds, it is compiled or refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from polygraft.adapters.files.folder import CONFIG, WEIGHTS
from polygraft.core.spec import BaseSpec
from polygraft.errors import AdapterInvalid
from tests.adapters.specimen import Specimen, compile_folder

KINDS = ["lora", "adalora", "ia3", "lokr", "oft", "vera", "fourierft", "osf", "poly", "prefix", "p-tuning", "cpt",
         "trainable-tokens", "lora-saved-tokens"]  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.just(2**63), st.just(-1),
    st.just(10**400), st.just("(" * 3000), st.just(".{1000000000}"), st.just("\x00\udc80\n"), st.just("all-linear"),
    st.just(""),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.text(max_size=8), st.just("q_proj"), st.just("(")), inner, max_size=4),
    ),
    max_leaves=8,
)
FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def ends(folder: Path, base: BaseSpec) -> None:
    why = ""
    try:
        compile_folder(folder, base)
    except AdapterInvalid as error:
        why = str(error)
    assert why.isprintable()
    assert len(why) < 10_000


@pytest.fixture
def folders(specimen: Callable[[str], Specimen], tmp_path: Path) -> dict[str, Path]:
    return {kind: specimen(kind).save(tmp_path / kind) for kind in KINDS}


@given(kind=st.sampled_from(KINDS), data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=FIXTURES)
def test_any_value_of_any_option(
    folders: dict[str, Path], spec: BaseSpec, kind: str, data: st.DataObject
) -> None:
    path = folders[kind] / CONFIG
    whole = path.read_text()
    config: dict[str, Any] = json.loads(whole)
    for _ in range(data.draw(st.integers(1, 2))):
        config[data.draw(st.sampled_from(sorted(config)))] = data.draw(VALUES)
    try:
        path.write_text(json.dumps(config))
        ends(folders[kind], spec)
    finally:
        path.write_text(whole)


@given(kind=st.sampled_from(KINDS), file=st.sampled_from([CONFIG, WEIGHTS]), data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=FIXTURES)
def test_any_bytes_in_place_of_others(
    folders: dict[str, Path], spec: BaseSpec, kind: str, file: str, data: st.DataObject
) -> None:
    path = folders[kind] / file
    whole = path.read_bytes()
    # Of the weights mostly the header, which is what is parsed.
    start = data.draw(st.integers(0, min(len(whole), 2000) - 1))
    length = data.draw(st.integers(0, 20))
    changed = whole[:start] + data.draw(st.binary(max_size=20)) + whole[start + length :]
    try:
        path.write_bytes(changed)
        ends(folders[kind], spec)
    finally:
        path.write_bytes(whole)


@given(header=st.dictionaries(st.text(max_size=5), VALUES, max_size=3), more=st.binary(max_size=40))
@example(header={"x": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}, more=b"")
@settings(max_examples=150, deadline=None, suppress_health_check=FIXTURES)
def test_any_header(folders: dict[str, Path], spec: BaseSpec, header: dict[str, Any], more: bytes) -> None:
    raw = json.dumps(header).encode()
    path = folders["lora"] / WEIGHTS
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + more)
    with pytest.raises(AdapterInvalid):
        compile_folder(folders["lora"], spec)
