"""The structures that Python fills and the C++ operators read, in the layout of the C++ sources.

Each is named after its C++ structure. `check_layouts` compares both sides when the library is loaded.
"""

from __future__ import annotations

import ctypes

import torch

from polygraft.errors import LayoutMismatch

MAX_MODULES = 4  # linear.h's kMaxModules
A_IN_PANELS, SCALES_SUM = 1, 2  # side_path.h's Flags
STORAGE = {"none": 1, "int8": 2, "nf4": 3, "fp4": 3}  # side_path.h's Storage


class PlanStruct(ctypes.Structure):
    """attention.h's `Plan`: one step's rows in the paged cache."""

    _fields_ = (
        ("slot_mapping", ctypes.c_void_p),
        ("query_start", ctypes.c_void_p),
        ("context_lens", ctypes.c_void_p),
        ("prefix_lens", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("max_blocks", ctypes.c_int64),
        ("num_sequences", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("bare", ctypes.c_void_p),
        ("num_layers", ctypes.c_int64),
    )


class LayerStruct(ctypes.Structure):
    """attention.h's `Layer`: one attention layer."""

    _fields_ = (
        ("key_cache", ctypes.c_void_p),
        ("value_cache", ctypes.c_void_p),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("sinks", ctypes.c_void_p),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("index", ctypes.c_int64),
    )


class EntryStruct(ctypes.Structure):
    """side_path.h's `Entry`: one adapter's weights for one module. Addresses are 0 where it has none.

    The Triton kernels read the same table, as int64 numbers.
    """

    _fields_ = (
        ("a", ctypes.c_int64),
        ("b", ctypes.c_int64),
        ("bias", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("in_scale", ctypes.c_int64),
        ("out_scale", ctypes.c_int64),
        ("w1", ctypes.c_int64),
        ("w2", ctypes.c_int64),
        ("o2", ctypes.c_int64),
        ("i2", ctypes.c_int64),
        ("rotation", ctypes.c_int64),
        ("rotation_size", ctypes.c_int64),
        ("rotation_step", ctypes.c_int64),
        ("flags", ctypes.c_int64),
        ("scaling", ctypes.c_double),
    )


ENTRY = ctypes.sizeof(EntryStruct) // 8
"""int64 numbers in an `EntryStruct`."""


def entry_column(field: str) -> int:
    """Which of an entry's int64 numbers holds a field."""
    offset: int = getattr(EntryStruct, field).offset
    return offset // 8


class WeightsStruct(ctypes.Structure):
    """side_path.h's `Weights`: what a module multiplies by."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("storage", ctypes.c_int64),
    )


class ModuleStruct(ctypes.Structure):
    """side_path.h's `Module`: one linear module and its adapters."""

    _fields_ = (
        ("table", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("weights", WeightsStruct),
    )


class GroupStruct(ctypes.Structure):
    """linear.h's `Group`: modules that read the same input."""

    _fields_ = (
        ("in_features", ctypes.c_int64),
        ("modules", ctypes.c_int64),
        ("module", ModuleStruct * MAX_MODULES),
    )


class SegmentStruct(ctypes.Structure):
    """side_path.h's `Segment`: neighbouring rows that use one adapter."""

    _fields_ = (
        ("first", ctypes.c_int32),
        ("last", ctypes.c_int32),
        ("slot", ctypes.c_int32),
        ("weight", ctypes.c_float),
        ("offset", ctypes.c_int32),
    )


class BottleneckStruct(ctypes.Structure):
    """bottleneck.h's `Bottleneck`: one adapter's weights at one site."""

    _fields_ = (
        ("down", ctypes.c_int64),
        ("up", ctypes.c_int64),
        ("down_bias", ctypes.c_int64),
        ("up_bias", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("activation", ctypes.c_int64),
        ("reads", ctypes.c_int64),
        ("normalizes", ctypes.c_int64),
        ("residual", ctypes.c_int64),
        ("norm_weight", ctypes.c_int64),
        ("norm_bias", ctypes.c_int64),
        ("norm_skips_sum", ctypes.c_int64),
        ("norm_inside", ctypes.c_int64),
        ("scaling", ctypes.c_double),
    )


class SiteStruct(ctypes.Structure):
    """bottleneck.h's `Site`: the adapters that have weights at one site."""

    _fields_ = (("table", ctypes.c_void_p), ("slots", ctypes.c_int64))


class NormStruct(ctypes.Structure):
    """decoder_layer.h's `Norm`: one norm and the adapters that replace its scale."""

    _fields_ = (
        ("scale", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("table", ctypes.c_void_p),
        ("slots", ctypes.c_int64),
    )


class DecoderLayerStruct(ctypes.Structure):
    """decoder_layer.h's `DecoderLayer`: one decoder layer's parts."""

    _fields_ = (
        ("attention", ctypes.c_void_p),
        ("qkv", ctypes.c_void_p),
        ("o", ctypes.c_void_p),
        ("gate_up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("before_attention", NormStruct),
        ("after_attention", NormStruct),
        ("before_mlp", NormStruct),
        ("after_mlp", NormStruct),
        ("q", NormStruct),
        ("k", NormStruct),
        ("hidden", ctypes.c_int64),
        ("activation", ctypes.c_int64),
        ("attention_site", ctypes.c_void_p),
        ("mlp_site", ctypes.c_void_p),
    )


class RowsStruct(ctypes.Structure):
    """decoder_layer.h's `Rows`: the step's rows as decoder layers read them."""

    _fields_ = (
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("plan", ctypes.c_void_p),
        ("segments", ctypes.c_void_p),
        ("num_segments", ctypes.c_int64),
        ("scratch", ctypes.c_void_p),
        ("max_rank", ctypes.c_int64),
        ("max_width", ctypes.c_int64),
        ("buffer", ctypes.c_void_p),
    )


SHARED: tuple[type[ctypes.Structure], ...] = (
    PlanStruct, LayerStruct, EntryStruct, WeightsStruct, ModuleStruct, GroupStruct, SegmentStruct,
    BottleneckStruct, SiteStruct, NormStruct, DecoderLayerStruct, RowsStruct,
)  # fmt: skip
"""All structures that both sides declare."""


def as_int64(structure: ctypes.Structure) -> torch.Tensor:
    """A copy of a structure of 8-byte fields, as a row of a table: int64 [fields]."""
    return torch.frombuffer(bytearray(structure), dtype=torch.int64)


def describe_layouts() -> str:
    """Python's layouts in the form of layouts.h's: a line "name offset size" for each structure and field."""
    lines = []
    for structure in SHARED:
        name = structure.__name__.removesuffix("Struct")
        lines.append(f"{name} 0 {ctypes.sizeof(structure)}")
        for field, *_ in structure._fields_:
            place = getattr(structure, field)
            lines.append(f"{name}.{field} {place.offset} {place.size}")
    return "".join(f"{line}\n" for line in lines)


def check_layouts(theirs: str) -> None:
    """Compare Python's layouts with those of a library.

    Raises:
        LayoutMismatch: they differ. Operators would read and write memory in the wrong places.
    """
    ours = describe_layouts()
    if ours != theirs:
        differing = sorted({*ours.splitlines()} ^ {*theirs.splitlines()})
        raise LayoutMismatch(differing or ["the order of the fields"])
