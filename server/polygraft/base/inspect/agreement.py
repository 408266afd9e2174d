"""Whether an operator gives what a module of the base does: the same random rows for all that are tried."""

from __future__ import annotations

import torch

_ROWS = torch.tensor([1e-3, 1e-1, 1.0, 10.0, 100.0])
"""Magnitudes of the random rows, so that an epsilon shows and no activation is tried near zero alone."""


def random_rows(width: int) -> torch.Tensor:
    """[rows of different magnitude, width]"""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(_ROWS), width, generator=generator) * _ROWS[:, None]


def agree(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal but for rounding, each row by its own magnitude."""
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        return False
    error = (mine.double() - theirs.double()).norm(dim=-1)
    coarse = mine.dtype in (torch.bfloat16, torch.float16)
    allowed = theirs.double().norm(dim=-1) * (2**-6 if coarse else 1e-5)
    return bool((error <= allowed).all())
