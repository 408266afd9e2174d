"""Raised while a folder is compiled; the reader turns them into the list of everything that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from polygraft.adapters.files.shown import shown

T = TypeVar("T")


class Problem(Exception):
    """One module or tensor of the folder can't be served; the others are still looked at.

    Args:
        texts: at least one.
    """

    def __init__(self, *texts: str) -> None:
        super().__init__(*texts)
        self.texts = texts


def all_of(*takes: Callable[[], T]) -> list[T]:
    """Return what several functions take. Raises Problem with what is wrong with each of them."""
    taken: list[T] = []
    texts: list[str] = []
    for take in takes:
        try:
            taken.append(take())
        except Problem as problem:
            texts += problem.texts
    if texts:
        raise Problem(*texts)
    return taken


class OptionProblem(Problem):
    """An option that all modules depend on can't be served, so none of them is looked at any further."""


def require(valid: bool, **options: object) -> None:
    """Raise OptionProblem with the options' names and values, unless they are valid together."""
    if not valid:
        values = [f"{name} {shown(value)}" for name, value in options.items()]
        *first, last = values
        if len(first) > 1:
            text = f"{first[0]} with {', '.join(first[1:])} and {last}"
        else:
            text = " with ".join(values)
        raise OptionProblem(f"{text} isn't valid")
