"""What the kinds that add low-rank weights to modules share."""

from __future__ import annotations

import math
from typing import Any

import torch

from polygraft.adapters.files.numbers import is_alpha, is_rank
from polygraft.adapters.files.patterns import Form, OptionByModule
from polygraft.adapters.files.reader import FolderReader, shown, stays_finite

PREFIX = "base_model.model."
"""PEFT's, before the name of the base's module."""


class ModuleSettings:
    """Rank and alpha by module: a default, and patterns for the exceptions.

    Args:
        alpha_key: the option's name, which differs by kind; None for a kind without one.
        rank: where the configuration has none.
    """

    def __init__(self, reader: FolderReader, alpha_key: str | None, rank: int = 8) -> None:
        self._reader = reader
        self._rank: Any = reader.option("r", int, rank)
        self._ranks = OptionByModule(reader.option("rank_pattern", dict, {}), Form.KEY, reader.matching)
        self._alpha: Any = 1
        alphas: dict[str, Any] = {}
        if alpha_key is not None:
            self._alpha = reader.option(alpha_key, (int, float), 8)
            alphas = reader.option("alpha_pattern", dict, {})
        self._alphas = OptionByModule(alphas, Form.KEY, reader.matching)

    def of(self, module: str) -> tuple[int, float] | None:
        """Rank and alpha of a module, 1 without one; None after noting that they make no sense.

        Raises: one of `BAD_PATTERN`.
        """
        rank = self._ranks.of(module, self._rank)
        alpha = self._alphas.of(module, self._alpha)
        if is_rank(rank) and is_alpha(alpha):
            return rank, alpha
        self._reader.problems.append(
            f"rank {shown(rank)} with alpha {shown(alpha)} for {module} makes no sense"
        )
        return None

    def paired(
        self,
        module: str,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A and B in one type, otherwise unchanged; None after noting that what they add isn't finite.

        A module's two matrices must share a type, even if the file's don't: the wider one.

        Args:
            scaling: applied later in float32.
            bias: scaled already.
        """
        dtype = torch.promote_types(a.dtype, b.dtype)
        if stays_finite(b, scaling) and (bias is None or bias.isfinite().all()):
            return a.to(dtype).contiguous(), b.to(dtype).contiguous()
        self._reader.problems.append(f"scaling {scaling} makes weights of {module} infinite")
        return None

    @property
    def largest_rank(self) -> int:
        """Of all that the configuration names, whether or not a module has it."""
        return max((rank for rank in (self._rank, *self._ranks.values) if is_rank(rank)), default=0)

    def note_bad_pattern(self, error: Exception) -> None:
        """Note what `of` raised."""
        self._reader.problems.append(
            f"rank_pattern or alpha_pattern is not a regular expression that can be matched: {error}"
        )


def scaling_of(rank: int, alpha: float, *, rslora: bool) -> float:
    """LoRA's factor on B A; rank-stabilized (arXiv 2312.03732) or not."""
    return alpha / (math.sqrt(rank) if rslora else rank)
