"""The structures that the C++ sources declare, field for field."""

from __future__ import annotations

import ctypes

MAX_MODULES = 4  # linear.h's kMaxModules
ENTRY = 16  # int64 fields of side_path.h's `Entry`
SCALING = 15  # the last of them
A_IN_PANELS, SCALES_SUM = 1, 2  # its flags
STORAGE = {"none": 1, "int8": 2, "nf4": 3, "fp4": 3}  # side_path.h's Storage


class PlanStruct(ctypes.Structure):
    """attention.h's `Plan`."""

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
    """attention.h's `Layer`."""

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


class WeightsStruct(ctypes.Structure):
    """side_path.h's `Weights`."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("storage", ctypes.c_int64),
    )


class ModuleStruct(ctypes.Structure):
    """side_path.h's `Module`."""

    _fields_ = (
        ("table", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("weights", WeightsStruct),
    )


class GroupStruct(ctypes.Structure):
    """linear.h's `Group`."""

    _fields_ = (
        ("in_features", ctypes.c_int64),
        ("modules", ctypes.c_int64),
        ("module", ModuleStruct * MAX_MODULES),
    )


class NormStruct(ctypes.Structure):
    """decoder_layer.h's `Norm`."""

    _fields_ = (
        ("scale", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("table", ctypes.c_void_p),
        ("slots", ctypes.c_int64),
    )


class SiteStruct(ctypes.Structure):
    """bottleneck.h's `Site`."""

    _fields_ = (("table", ctypes.c_void_p), ("slots", ctypes.c_int64))


class DecoderLayerStruct(ctypes.Structure):
    """decoder_layer.h's `DecoderLayer`."""

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
    """decoder_layer.h's `Rows`."""

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
