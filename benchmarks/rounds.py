"""Rounds in which all sides take turns, so that drift of the machine meets all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Figures = Mapping[str, float]


def in_turn(sides: Mapping[str, Callable[[int], Figures]], rounds: int) -> dict[str, list[Figures]]:
    """Figures by side of `rounds` counted rounds, after one that warms up.

    Args:
        sides: each takes the round's number, 0 for the warm-up.
    """
    measured: dict[str, list[Figures]] = {name: [] for name in sides}
    order = list(sides)
    for n in range(rounds + 1):
        # Whoever follows a side pays for what it has left behind, so everybody does in turn.
        first = n % len(order)
        for name in order[first:] + order[:first]:
            figures = sides[name](n)
            shown = {key: round(value, 3) for key, value in figures.items()}
            print(f"  round {n}  {name:24}", shown, flush=True)
            if n:
                measured[name].append(figures)
    return measured
