"""The layouts of the structures that Python and the C++ operators share."""

from __future__ import annotations

import ctypes

import pytest

from polygraft.errors import LayoutMismatch
from polygraft.layers.native import structures
from polygraft.layers.native.kernels import Kernels, load_kernels
from polygraft.layers.step import SEGMENT_DTYPE, Segment

KERNELS = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")


def every_structure() -> list[type[ctypes.Structure]]:
    return [
        item
        for item in vars(structures).values()
        if isinstance(item, type) and issubclass(item, ctypes.Structure)
    ]


def test_every_structure_is_compared() -> None:
    assert {*structures.SHARED} == {*every_structure()}


class Library:
    """Stands in for a library with other layouts."""

    def __init__(self, text: str) -> None:
        self.polygraft_layouts = lambda: text.encode()


class Reordered(ctypes.Structure):
    _fields_ = (("slots", ctypes.c_int64), ("table", ctypes.c_void_p))


class Narrower(ctypes.Structure):
    _fields_ = (("table", ctypes.c_void_p), ("slots", ctypes.c_int32))


class Longer(ctypes.Structure):
    _fields_ = (*structures.SiteStruct._fields_, ("more", ctypes.c_int64))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (Reordered, ["Site.slots 8 8", "Site.table 8 8"]),
        (Narrower, ["Site.slots 8 4", "Site.slots 8 8"]),
        (Longer, ["Site 0 16", "Site 0 24", "Site.more 16 8"]),
    ],
)
def test_a_library_of_another_layout_is_refused(
    other: type[ctypes.Structure], named: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library(structures.describe_layouts())
    other = type("SiteStruct", (other,), {})
    shared = [other if item is structures.SiteStruct else item for item in structures.SHARED]
    monkeypatch.setattr(structures, "SHARED", shared)
    with pytest.raises(LayoutMismatch) as error:
        Kernels(library)  # type: ignore[arg-type] # a stand-in
    assert all(line in str(error.value) for line in named)


@KERNELS
def test_a_changed_structure_is_noticed_when_the_real_library_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    from polygraft.layers.native import build

    library = build.load()
    assert library is not None
    Kernels(library)
    monkeypatch.setattr(structures, "SHARED", structures.SHARED[:-1])
    with pytest.raises(LayoutMismatch, match=r"Rows\.buffer 64 8"):
        Kernels(library)


def test_segments_have_the_structures_fields() -> None:
    assert SEGMENT_DTYPE.names == Segment._fields
    assert SEGMENT_DTYPE.itemsize == ctypes.sizeof(structures.SegmentStruct)


def test_an_entry_as_numbers() -> None:
    row = structures.as_int64(structures.EntryStruct(a=7, rank=3, scaling=0.5))
    assert row.shape == (structures.ENTRY,)
    assert row[structures.entry_column("a")] == 7
    assert row[structures.entry_column("rank")] == 3
    assert row.numpy().view("float64")[structures.entry_column("scaling")] == 0.5
