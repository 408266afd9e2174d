"""Decides which path is faster, and whether the measurements are good enough to say so."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from polygraft.cli.bench.compare.result import Comparison, Figures

MARGIN = 1.02
"""A path is faster if its tokens per second exceed the other's by more than this factor."""
ENOUGH_ROUNDS = 3
NOISY = 0.10
"""From this spread of a cell's rounds on, relative to their median, the machine counts as noisy."""


def count(number: int, noun: str) -> str:
    """Such as `1 request` or `4 requests`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Merged against unmerged at one concurrency, by the number of distinct adapters.

    Args:
        ratios: tokens per second of unmerged by those of merged.
        unmerged, merged: numbers of adapters at which this path is clearly faster: by more than the margin,
            and in each of its rounds more than the other one in any of its rounds.
    """

    concurrency: int
    ratios: dict[int, float]
    unmerged: tuple[int, ...]
    merged: tuple[int, ...]

    @property
    def crossover(self) -> int | None:
        """Distinct adapters from which on unmerged is clearly faster at each number that was measured."""
        found = None
        for number in sorted(self.ratios, reverse=True):
            if number not in self.unmerged:
                break
            found = number
        return found

    def short(self) -> str:
        """Return a few words for a panel's title."""
        if self.crossover is not None:
            return f"unmerged faster from {count(self.crossover, 'adapter')} on"
        if self.merged and len(self.merged) == len(self.ratios):
            return "merged faster throughout"
        return "no clear crossover"

    def sentence(self) -> str:
        """Summarise this concurrency in a sentence."""
        parts = []
        for path, numbers in (("unmerged", self.unmerged), ("merged", self.merged)):
            if numbers:
                times = [self.ratios[n] if path == "unmerged" else 1 / self.ratios[n] for n in numbers]
                least, most = f"{min(times):.2f}", f"{max(times):.2f}"
                by = least if least == most else f"{least} to {most}"
                which = ", ".join(map(str, numbers))
                noun = "adapter" if numbers == (1,) else "adapters"
                parts.append(f"{path} is faster with {which} {noun} ({by} times the tokens/s)")
        unclear = [n for n in sorted(self.ratios) if n not in (*self.unmerged, *self.merged)]
        if unclear:
            noun = "adapter" if unclear == [1] else "adapters"
            parts.append(f"no clear difference with {', '.join(map(str, unclear))} {noun}")
        return f"{count(self.concurrency, 'request')} in flight: {'; '.join(parts)}"


def verdicts(cells: Sequence[Figures]) -> list[Verdict]:
    """Return a verdict for each concurrency at which both paths were measured with the same mixes."""
    found = []
    for concurrency in sorted({cell.concurrency for cell in cells}):
        by_number: dict[int, dict[str, Figures]] = {}
        for cell in cells:
            if cell.concurrency == concurrency and not cell.mix.startswith("zipf"):
                by_number.setdefault(cell.distinct_adapters, {})[cell.path] = cell
        both = {n: by for n, by in sorted(by_number.items()) if {"merged", "unmerged"} <= by.keys()}
        if both:
            found.append(
                Verdict(
                    concurrency,
                    {n: by["unmerged"].tokens_per_s / by["merged"].tokens_per_s for n, by in both.items()},
                    tuple(n for n, by in both.items() if _clearly(by["unmerged"], by["merged"])),
                    tuple(n for n, by in both.items() if _clearly(by["merged"], by["unmerged"])),
                )
            )
    return found


def crossovers(cells: Sequence[Figures]) -> dict[str, int | None]:
    """By concurrency: the number of distinct adapters from which on unmerged is clearly faster; or None."""
    return {str(verdict.concurrency): verdict.crossover for verdict in verdicts(cells)}


def headline(found: Comparison) -> str:
    """The comparison in a sentence."""
    told = verdicts(found.cells)
    total = sum(len(verdict.ratios) for verdict in told)
    if not total:
        return "Merged and unmerged were not both measured."
    unmerged = sum(len(verdict.unmerged) for verdict in told)
    merged = sum(len(verdict.merged) for verdict in told)
    return (
        f"Of {count(total, 'load')}, unmerged LoRA is clearly faster on {unmerged}, merged on {merged}; "
        f"{_left(total - unmerged - merged)} too close to call."
    )


def _left(number: int) -> str:
    return {0: "none is", 1: "1 is"}.get(number, f"{number} are")


def caveats(found: Comparison) -> list[str]:
    """Return the reasons for reading the figures with caution."""
    lines = []
    if found.rounds < ENOUGH_ROUNDS:
        lines.append(
            f"Only {count(found.rounds, 'round')}: differences may be noise"
            + (", and none is called clear" if found.rounds == 1 else "")
            + f". Repeat with --rounds {ENOUGH_ROUNDS} or more."
        )
    spreads = [(max(c.rates) - min(c.rates)) / statistics.median(c.rates) for c in found.cells if c.rates[1:]]
    if spreads and statistics.median(spreads) > NOISY:
        lines.append(
            f"The rounds of a load differ by {statistics.median(spreads):.0%} (median): the machine was busy "
            "with something else, or --new-tokens is small."
        )
    return lines


def _clearly(one: Figures, other: Figures) -> bool:
    if len(one.rates) < 2 or len(other.rates) < 2:
        return False
    return one.tokens_per_s > MARGIN * other.tokens_per_s and min(one.rates) > max(other.rates)
