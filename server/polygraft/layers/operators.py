"""Chooses the operators of a device: C++ on CPUs, Triton on CUDA, and torch, the reference of both.

Every layer has its operator in torch. It calls another one where `Operators` has it, so what runs on a device
is decided here and nowhere else.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from polygraft.layers.native.kernels import Kernels, load_kernels

if TYPE_CHECKING:
    from polygraft.layers.cuda.triton_side_path import TritonSidePath

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Operators:
    """The operators of one device; torch's serve for those that are None.

    Args:
        kernels: in C++. They take contiguous tensors of `kernels.DTYPES` on the CPU.
        triton: side paths in Triton.
        packs: weights are laid out anew for its products.
        sums_widely: torch's own product of 16-bit matrices can return float32.
    """

    kernels: Kernels | None = None
    triton: TritonSidePath | None = None
    packs: bool = False
    sums_widely: bool = False


TORCH = Operators()


def operators_for(device: torch.device, *, native: bool = True) -> Operators:
    """Return the operators of a device.

    Args:
        native: False asks for torch's, for tests and comparisons.
    """
    if device.type == "cpu":
        return Operators(kernels=load_kernels() if native else None, packs=True)
    if device.type == "cuda":
        return Operators(triton=_triton() if native else None, sums_widely=True)
    return TORCH


@functools.cache
def _triton() -> TritonSidePath | None:
    try:
        # Here and not above: triton is large, slow to import and, on a CPU, of no use.
        from polygraft.layers.cuda.triton_side_path import TritonSidePath
    except ImportError as error:
        log.warning("no Triton, the slower torch operators serve: %s", error)
        return None
    return TritonSidePath()
