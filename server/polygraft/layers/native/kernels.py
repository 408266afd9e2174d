"""Calls into the C++ operators: argument types, and the structures that the C++ sources declare."""

from __future__ import annotations

import ctypes
import functools

import torch

from polygraft.layers.native import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
MAX_MODULES = 4  # linear.h's kMaxModules
STORAGE = {"none": 1, "int8": 2, "nf4": 3, "fp4": 3}  # linear.h's Storage


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
    )


class ModuleStruct(ctypes.Structure):
    """linear.h's `Module`."""

    _fields_ = (
        ("table", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("width", ctypes.c_int64),
    )


class GroupStruct(ctypes.Structure):
    """linear.h's `Group`."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("storage", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("modules", ctypes.c_int64),
        ("module", ModuleStruct * MAX_MODULES),
    )


class Kernels:
    """The library's entry points; tensors are checked by the callers in layers/.

    Args:
        library: as `build.load` gives it.
    """

    panel: int
    """Columns in a panel of packed weights."""

    def __init__(self, library: ctypes.CDLL) -> None:
        integer, address, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
        self.linear = library.polygraft_linear
        self.linear.argtypes = (
            integer, address, address, size, address, address, size, address, size, integer,
        )  # fmt: skip
        self.linear.restype = None
        self.paged_attention = library.polygraft_paged_attention
        self.paged_attention.argtypes = (
            integer, address, address, address, size, size, address, size, size, address, size, size,
            address, integer,
        )  # fmt: skip
        self.paged_attention.restype = None
        # Called with the interpreter's lock held: they take microseconds, and giving the lock up for each
        # would let the event loop's thread in between, hundreds of times a step.
        small = ctypes.PyDLL(library._name)
        self.rms_norm = small.polygraft_rms_norm
        self.rms_norm.argtypes = (integer, address, size, size, address, ctypes.c_float, address, integer)
        self.rms_norm.restype = None
        self.gate = small.polygraft_gate
        self.gate.argtypes = (integer, address, address, size, integer, address, integer)
        self.gate.restype = None
        self.rotate = small.polygraft_rotate
        self.rotate.argtypes = (
            integer, address, size, size, size, size, size, address, address, address, integer,
        )  # fmt: skip
        self.rotate.restype = None
        library.polygraft_panel.restype = size
        self.panel = library.polygraft_panel()


@functools.cache
def load_kernels() -> Kernels | None:
    """The C++ operators, or None where they can't be built."""
    library = build.load()
    return None if library is None else Kernels(library)
