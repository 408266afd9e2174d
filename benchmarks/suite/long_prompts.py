"""What a long prompt does to the requests that are running: chunked prefill against none."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable

import numpy as np

from benchmarks.suite.experiment import VOCABULARY, Experiment, Row, interleave, loop, serving
from polygraft_client import AsyncClient

PROMPTS = (1024, 4096)
CHUNKS = (64, 256, 8192)
OTHERS = 8
LEAD_SECONDS = 2.0
"""How long the others run alone, for comparison."""


async def disturb(address: str, prompt_tokens: int, seed: int) -> dict[str, float]:
    """The others' inter-token latencies before and during a long prompt, which then generates one token."""
    draw = random.Random(seed)
    times: list[list[float]] = [[] for _ in range(OTHERS)]
    started = [asyncio.Event() for _ in range(OTHERS)]

    def prompt(tokens: int) -> list[int]:
        return [draw.randrange(VOCABULARY) for _ in range(tokens)]

    async with AsyncClient(address) as client:

        async def other(n: int) -> None:
            async with client.stream(
                token_ids=prompt(32),
                max_new_tokens=2000,
                ignore_eos=True,
                temperature=0.0,
                return_token_ids=True,
            ) as stream:
                async for chunk in stream:
                    times[n] += [time.perf_counter()] * len(chunk.token_ids)
                    started[n].set()

        others = [asyncio.create_task(other(n)) for n in range(OTHERS)]
        await asyncio.gather(*(event.wait() for event in started))
        await asyncio.sleep(LEAD_SECONDS)
        began = time.perf_counter()
        await client.generate(
            token_ids=prompt(prompt_tokens), max_new_tokens=1, ignore_eos=True, temperature=0.0
        )
        ended = time.perf_counter()
        # The step that carried the last chunk gave them a token as well.
        await asyncio.sleep(0.2)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    before, during = [], []
    for one in times:
        for last, now in itertools.pairwise(one):
            if began <= now and last <= ended:
                during.append(now - last)
            elif began - LEAD_SECONDS / 2 <= last and now < began:
                before.append(now - last)
    return {
        "others' ITL p50 alone, ms": 1000 * float(np.median(before)),
        "others' ITL p50 meanwhile, ms": 1000 * float(np.median(during)),
        "others' longest wait, ms": 1000 * max(during),
        "TTFT of the prompt, ms": 1000 * (ended - began),
    }


def run(rounds: int) -> list[Row]:
    rows: list[Row] = []
    for chunk in CHUNKS:
        flags = ("--max-num-batched-tokens", str(chunk), "--max-num-seqs", "32", "--no-prefix-caching")
        with serving(*flags) as where:
            measured = interleave({str(tokens): _side(where.grpc, tokens) for tokens in PROMPTS}, rounds)
        rows += [{"prompt tokens": t, "tokens a step": chunk, **measured[str(t)]} for t in PROMPTS]
    return sorted(rows, key=lambda row: row["prompt tokens"])


def _side(address: str, tokens: int) -> Callable[[int], dict[str, float]]:
    return lambda n: loop().run(disturb(address, tokens, n))


EXPERIMENT = Experiment("long-prompts", run)
