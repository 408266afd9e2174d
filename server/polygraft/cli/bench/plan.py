"""What is sent, to which adapter and when: settled before the first request, from one seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from polygraft_client import LoraPath

BASE = ""
"""The name of no adapter."""


class Choice(StrEnum):
    """How requests spread over the adapters."""

    UNIFORM = "uniform"
    ZIPF = "zipf"


@dataclass(frozen=True, slots=True)
class Load:
    """A run's shape.

    Args:
        adapters: names; BASE is the base model.
        choice: ZIPF asks the n-th adapter 1 / n^exponent times as often as the first.
        prompt_tokens, new_tokens: of each request, exactly.
        shared_tokens: of the prompt, the same in every request of an adapter, as a system prompt is.
        rate: requests a second, at random times (an open loop); None sends the next when one ends.
        vocabulary_size: prompts are random ids of it.
        lora_path: of every request; None is the server's own.
    """

    adapters: Sequence[str]
    choice: Choice
    exponent: float
    prompt_tokens: int
    new_tokens: int
    shared_tokens: int
    rate: float | None
    vocabulary_size: int
    seed: int
    lora_path: LoraPath | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """One request; `at` is seconds after the start, 0 in a closed loop."""

    adapter: str
    token_ids: tuple[int, ...]
    at: float
    lora_path: LoraPath | None = None


def plan(load: Load) -> Iterator[Planned]:
    """Requests without end."""
    draw = random.Random(load.seed)  # noqa: S311 - a workload, not a secret
    weights = [
        1.0 if load.choice is Choice.UNIFORM else (n + 1) ** -load.exponent for n in range(len(load.adapters))
    ]
    cumulative = list(itertools.accumulate(weights))
    shared = [draw.randrange(load.vocabulary_size) for _ in range(load.shared_tokens)]
    at = 0.0
    while True:
        if load.rate is not None:
            at += draw.expovariate(load.rate)  # a Poisson process
        (adapter,) = draw.choices(load.adapters, cum_weights=cumulative)
        own = [draw.randrange(load.vocabulary_size) for _ in range(load.prompt_tokens - load.shared_tokens)]
        yield Planned(adapter, (*shared, *own), at, load.lora_path)
