"""One function that judges an answer, whichever way it was made (PEFT, the server, anything else)."""

from __future__ import annotations

import functools

import recipe

_load = functools.cache(recipe.load)


def score(adapter_name: str, prompt: str, expected: str, answer: str) -> float:
    """From 0 (wrong) to 1 (right), by the metric of the adapter's recipe."""
    return _load(adapter_name).score(prompt, expected, answer.strip())
