"""Options whose values differ by module, and what low-rank kinds make of ranks and alphas."""

from __future__ import annotations

import math
from typing import Any

import torch

from polygraft.adapters.files.numbers import is_alpha, is_rank
from polygraft.adapters.files.patterns import BadPattern, Form, OptionByModule
from polygraft.adapters.files.problems import OptionProblem, Problem
from polygraft.adapters.files.reader import FolderReader, stays_finite
from polygraft.adapters.files.shown import shown


class PatternedOption:
    """An option with a default, and another option with patterns for the exceptions.

    Args:
        key: of the patterns, such as "rank_pattern".
        form: where PEFT matches them.
    """

    def __init__(self, reader: FolderReader, key: str, form: Form, default: Any) -> None:
        self.default = default
        self._key = key
        self._values = OptionByModule(reader.option(key, dict, {}), form, reader.matching)

    def of(self, module: str) -> Any:
        """Return a module's value. Raises OptionProblem if a pattern can't be matched."""
        try:
            return self._values.of(module, self.default)
        except BadPattern as error:
            raise not_matched(self._key, error) from None

    @property
    def values(self) -> list[Any]:
        """The default and the values of all patterns, whether or not a module has them."""
        return [self.default, *self._values.values]


def not_matched(option: str, error: BadPattern) -> OptionProblem:
    """Return the problem that an option's pattern has."""
    return OptionProblem(f"{option} is not a regular expression that can be matched: {error}")


class RankAndAlpha:
    """Rank and alpha by module.

    Args:
        alpha_key: the option's name, which differs by kind; None for a kind without one.
        rank: where the configuration has none.
    """

    def __init__(self, reader: FolderReader, alpha_key: str | None, rank: int = 8) -> None:
        self._ranks = PatternedOption(reader, "rank_pattern", Form.KEY, reader.option("r", int, rank))
        self._alphas = None
        if alpha_key is not None:
            alpha = reader.option(alpha_key, (int, float), 8)
            self._alphas = PatternedOption(reader, "alpha_pattern", Form.KEY, alpha)

    def of(self, module: str) -> tuple[int, float]:
        """Return rank and alpha of a module, alpha being 1 for a kind without one.

        Raises:
            Problem: one of them isn't valid.
            OptionProblem: a pattern can't be matched.
        """
        rank = self._ranks.of(module)
        alpha = 1 if self._alphas is None else self._alphas.of(module)
        if is_rank(rank) and is_alpha(alpha):
            return rank, alpha
        raise Problem(f"rank {shown(rank)} with alpha {shown(alpha)} for {module} isn't valid")

    @property
    def largest_rank(self) -> int:
        """The largest rank that the configuration names, whether or not a module has it."""
        return max((rank for rank in self._ranks.values if is_rank(rank)), default=0)


def paired(
    module: str, a: torch.Tensor, b: torch.Tensor, scaling: float, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B in the wider one of their types, which the operators need, otherwise unchanged.

    Args:
        scaling: applied later in float32.
        bias: scaled already.

    Raises:
        Problem: what they add isn't finite.
    """
    if not stays_finite(b, scaling) or not (bias is None or bias.isfinite().all()):
        raise Problem(f"scaling {scaling} makes weights of {module} infinite")
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype).contiguous(), b.to(dtype).contiguous()


def scaling_of(rank: int, alpha: float, *, rslora: bool) -> float:
    """LoRA's factor on B A; rank-stabilized (arXiv 2312.03732) or not."""
    return alpha / (math.sqrt(rank) if rslora else rank)
