"""Workload W, one definition for every side: 16 concurrent requests over 8 LoRA adapters, 2 each.

Prompts of 64 tokens, exactly 64 new tokens each, greedy, end of sequence ignored; adapters of rank 8 on q, k,
v, o, gate, up and down (`adapter_files.py` writes them). Only the standard library is imported: peers read
this in environments of their own.
"""

from __future__ import annotations

import random

REQUESTS = 16
ADAPTERS = 8
PROMPT_TOKENS = 64
NEW_TOKENS = 64
RANK = 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapter_names(count: int = ADAPTERS) -> list[str]:
    """Names of the adapters."""
    return [f"random-{n}" for n in range(count)]


def prompts(count: int) -> list[list[int]]:
    """Token ids of the first prompts."""
    draw = random.Random(0)
    return [[draw.randrange(1000, 40_000) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def requests() -> list[tuple[list[int], str]]:
    """(token ids, adapter name) of each request."""
    names = adapter_names()
    return [(prompt, names[n % ADAPTERS]) for n, prompt in enumerate(prompts(REQUESTS))]
