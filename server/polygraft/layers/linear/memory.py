"""Memory for weights: in large pages where the system has them, and back to the system when it is free.

A step reads every weight once, so nearly every page is looked up anew. Pages of 2 MB instead of 4 KB take a
five-hundredth of the look-ups, and the processor's own prefetching doesn't end at each of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
from collections.abc import Callable, Iterable

import torch

LARGE_PAGE = 2 * 2**20
_ALIGNMENT = 64
"""Bytes: a cache line; Triton's wide loads need 16."""


def allocate(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes], not filled; whole large pages of it are asked to be such."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or nbytes < LARGE_PAGE:
        return torch.empty(nbytes, dtype=torch.uint8)
    # A mapping of its own: what the heap has once touched stays in small pages.
    area = mmap.mmap(-1, nbytes + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(area, dtype=torch.uint8)
    start = -whole.data_ptr() % LARGE_PAGE
    # No more than whole ones: the last would take up to 2 MB for what is left.
    with contextlib.suppress(OSError):  # a kernel without them
        area.madvise(advice, start, nbytes // LARGE_PAGE * LARGE_PAGE)
    return whole[start : start + nbytes]


class Arena:
    """One piece of memory for tensors whose sizes are known.

    Args:
        tensors: as many and as large as those that will be moved.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], device: torch.device | None = None) -> None:
        sizes = (-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors)
        *starts, total = itertools.accumulate(sizes, initial=0)
        on_cpu = device is None or device.type == "cpu"
        self._memory = allocate(total) if on_cpu else torch.empty(total, dtype=torch.uint8, device=device)
        self._starts = iter(starts)
        # One view of the whole for each type: a view of a view keeps both, and there are hundreds.
        self._typed: dict[torch.dtype, torch.Tensor] = {}

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The next one, moved here."""
        typed = self._typed.get(tensor.dtype)
        if typed is None:
            whole = len(self._memory) // tensor.itemsize * tensor.itemsize
            typed = self._typed[tensor.dtype] = self._memory[:whole].view(tensor.dtype)
        first = next(self._starts) // tensor.itemsize
        return typed[first : first + tensor.numel()].view(tensor.shape).copy_(tensor)


Place = Callable[[torch.Tensor], torch.Tensor]
"""Copies a tensor to where it is to lie."""


def give_back() -> None:
    """Let the system have what was freed: glibc would keep it, 100 MB once a small base is loaded."""
    with contextlib.suppress(AttributeError):  # other C libraries don't have it
        ctypes.CDLL(None).malloc_trim(0)
