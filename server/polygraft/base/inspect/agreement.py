"""Compares an operator's results with those of the base's own module, on random rows."""

from __future__ import annotations

import torch

_ROWS = torch.tensor([1e-3, 1e-1, 1.0, 10.0, 100.0])
"""Magnitudes of the random rows: small ones show a different epsilon, large ones a different activation."""


def random_rows(width: int) -> torch.Tensor:
    """Return [5, width] random float32 values, each row of another magnitude and the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(_ROWS), width, generator=generator) * _ROWS[:, None]


def agree(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two results [..., rows, width] are equal except for rounding, relative to each row's norm."""
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        return False
    error = (mine.double() - theirs.double()).norm(dim=-1)
    coarse = mine.dtype in (torch.bfloat16, torch.float16)
    allowed = theirs.double().norm(dim=-1) * (2**-6 if coarse else 1e-5)
    return bool((error <= allowed).all())
