"""Calls into the C++ operators, with the types of their arguments."""

from __future__ import annotations

import ctypes
import functools

import torch

from polygraft.layers.native import build
from polygraft.layers.native.structures import check_layouts

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
WEIGHT_DTYPES = {**DTYPES, torch.float16: 2}
"""Types of adapters' weights: the C++ operators take the first two, Triton's all three."""


class Kernels:
    """The library's entry points; tensors are checked by the callers in layers/.

    Args:
        library: as `build.load` gives it.

    Raises:
        LayoutMismatch: its structures aren't those of structures.py.
    """

    panel: int
    """Columns in a panel of packed weights."""

    def __init__(self, library: ctypes.CDLL) -> None:
        library.polygraft_layouts.restype = ctypes.c_char_p
        check_layouts(library.polygraft_layouts().decode())
        integer, address, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
        self.linear = library.polygraft_linear
        self.linear.argtypes = (
            integer, integer, address, address, size, address, address, size, address, size, integer,
        )  # fmt: skip
        self.linear.restype = None
        self.merge = library.polygraft_merge
        self.merge.argtypes = (integer, address, size, size, size, size, address, integer)
        self.merge.restype = None
        self.bottleneck = library.polygraft_bottleneck
        self.bottleneck.argtypes = (
            integer, address, address, size, address, address, address, size, size, address, size, size,
            integer,
        )  # fmt: skip
        self.bottleneck.restype = None
        self.paged_attention = library.polygraft_paged_attention
        self.paged_attention.argtypes = (
            integer, address, address, address, size, size, address, size, size, address, size, size,
            address, integer,
        )  # fmt: skip
        self.paged_attention.restype = None
        self.decoder_layers = library.polygraft_decoder_layers
        self.decoder_layers.argtypes = (integer, address, address, size, address, address, address, integer)
        self.decoder_layers.restype = None
        self.decoder_layer_buffer = library.polygraft_decoder_layer_buffer
        self.decoder_layer_buffer.argtypes = (address,)
        self.decoder_layer_buffer.restype = size
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
        self.likeliest = small.polygraft_likeliest
        self.likeliest.argtypes = (integer, address, size, size, address, integer)
        self.likeliest.restype = None
        library.polygraft_panel.restype = size
        self.panel = library.polygraft_panel()


@functools.cache
def load_kernels() -> Kernels | None:
    """The C++ operators, or None where they can't be built."""
    library = build.load()
    return None if library is None else Kernels(library)
