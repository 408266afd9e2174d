"""What every system is asked, in the terms of workload W. Only the standard library: peers import it too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.workload import NEW_TOKENS, REQUESTS, adapter_names, prompts, requests

IN_FLIGHT = REQUESTS
"""Most requests at once."""

REGISTERED = 100
"""Adapters in the store."""

MANY_REQUESTS = 2 * IN_FLIGHT
"""Of the case with all adapters: two full batches, since a peer without mixing needs minutes for them."""


class Ask(NamedTuple):
    """One request; `adapter` is None for the base model."""

    prompt: list[int]
    adapter: str | None


def _many() -> list[Ask]:
    # A stride that shares no factor with 100 spreads the requests evenly over the adapters.
    names = adapter_names(REGISTERED)
    return [Ask(prompt, names[n * 37 % REGISTERED]) for n, prompt in enumerate(prompts(MANY_REQUESTS))]


MIXED = [Ask(prompt, name) for prompt, name in requests()]
FIRST_ADAPTER = MIXED[0].adapter

CASES: dict[str, list[Ask]] = {
    "base-1": [MIXED[0]._replace(adapter=None)],
    "lora-1": [MIXED[0]],
    "base-16": [ask._replace(adapter=None) for ask in MIXED],
    "lora-16": [ask._replace(adapter=FIRST_ADAPTER) for ask in MIXED],
    "mixed-16": MIXED,
    "mixed-100": _many(),
}

TITLES = {
    "base-1": "1, base",
    "lora-1": "1, LoRA",
    "base-16": "16, base",
    "lora-16": "16, one LoRA",
    "mixed-16": "16 over 8 LoRAs",
    "mixed-100": f"{MANY_REQUESTS} over {REGISTERED} LoRAs",
}


def by_adapter(asks: Sequence[Ask]) -> list[list[int]]:
    """Positions of the requests that a server without mixing can batch: one adapter, one window in flight."""
    groups: list[list[int]] = []
    for start in range(0, len(asks), IN_FLIGHT):
        window: dict[str | None, list[int]] = {}
        for n in range(start, min(start + IN_FLIGHT, len(asks))):
            window.setdefault(asks[n].adapter, []).append(n)
        groups += window.values()
    return groups


def answer(outputs: Sequence[Sequence[int]], seconds: float, **more: float) -> dict[str, Any]:
    """A round's result, once it is sure that every request got all its tokens.

    Raises:
        ValueError: a request got another number of tokens.
    """
    lengths = {len(output) for output in outputs}
    if lengths != {NEW_TOKENS}:
        raise ValueError(f"answers of {sorted(lengths)} tokens instead of {NEW_TOKENS}")
    tokens = len(outputs) * NEW_TOKENS
    return {"tokens_per_s": tokens / seconds, **more, "outputs": [list(map(int, one)) for one in outputs]}
