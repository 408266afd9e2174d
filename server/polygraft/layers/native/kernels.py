"""Calls into the C++ operators: argument types, and the structures that kernels.cpp declares."""

from __future__ import annotations

import ctypes
import functools

import torch

from polygraft.layers.native import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class PlanStruct(ctypes.Structure):
    """kernels.cpp's `Plan`."""

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
    """kernels.cpp's `Layer`."""

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


class Kernels:
    """The library's two entry points; tensors are checked by the callers in layers/."""

    def __init__(self, library: ctypes.CDLL) -> None:
        integer, address, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
        # Called with the interpreter's lock held: it takes microseconds, and giving the lock up for every
        # module would let the event loop's thread in between, hundreds of times a step.
        self.low_rank = ctypes.PyDLL(library._name).polygraft_low_rank
        self.low_rank.argtypes = (
            integer, address, address, size, size, address, size, address, address, size, integer,
        )  # fmt: skip
        self.low_rank.restype = None
        self.paged_attention = library.polygraft_paged_attention
        self.paged_attention.argtypes = (
            integer, address, address, address, size, size, address, size, size, address, size, size,
            address, integer,
        )  # fmt: skip
        self.paged_attention.restype = None


@functools.cache
def load_kernels() -> Kernels | None:
    """The C++ operators, or None where they can't be built."""
    library = build.load()
    return None if library is None else Kernels(library)
