"""Whether answers show that adapters were applied, and how far two systems agree."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

Outputs = list[list[int]]


class WrongAnswers(Exception):
    """A system's answers can't be what was asked for."""


def check_adapters(outputs: Mapping[str, Outputs]) -> None:
    """Compare the answers of cases with and without adapters, request by request.

    Raises:
        WrongAnswers: adapters changed fewer than a quarter of the answers (those in a rut stay), or all
            of them answer as the first one.
    """
    for with_lora, without in (("lora-1", "base-1"), ("lora-16", "base-16"), ("mixed-16", "base-16")):
        pairs = list(zip(outputs.get(with_lora, ()), outputs.get(without, ()), strict=False))
        changed = sum(answer != other for answer, other in pairs)
        if 4 * changed < len(pairs):
            raise WrongAnswers(
                f"{changed} of {len(pairs)} answers in {with_lora} differ from {without}: "
                "adapters aren't applied"
            )
    if "lora-16" in outputs and outputs["lora-16"] == outputs.get("mixed-16"):
        raise WrongAnswers("lora-16 and mixed-16 give the same answers: one adapter serves all")


def agreement(outputs: Outputs, reference: Outputs) -> float:
    """Tokens before the first difference, on average: greedy answers part at near ties and stay apart."""
    return statistics.fmean(
        next((n for n, (x, y) in enumerate(zip(one, other, strict=True)) if x != y), len(one))
        for one, other in zip(outputs, reference, strict=True)
    )
