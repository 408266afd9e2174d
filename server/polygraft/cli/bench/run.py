"""Sends a planned load and notes what each request took."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from polygraft.cli.bench.plan import Planned
from polygraft_client import AsyncClient, GenerateOptions, PolygraftError


@dataclass(slots=True)
class Measured:
    """One request. Seconds; from when it was due, so that an open loop's delays count.

    Args:
        intervals: between tokens, one for each but the first.
        error: the reason it failed, or None.
    """

    adapter: str
    first_token: float = 0.0
    total: float = 0.0
    tokens: int = 0
    cached_tokens: int = 0
    intervals: list[float] = field(default_factory=list)
    error: str | None = None


async def closed_loop(
    client: AsyncClient,
    requests: Iterator[Planned],
    count: int,
    concurrency: int,
    new_tokens: int,
    on_done: Callable[[Measured], None],
) -> list[Measured]:
    """Keep `concurrency` requests running until `count` have been sent; a slot's next follows its last."""
    left = iter(range(count))
    results: list[Measured] = []

    async def worker() -> None:
        for _ in left:
            result = await one(client, next(requests), new_tokens, time.perf_counter())
            results.append(result)
            on_done(result)

    await asyncio.gather(*(worker() for _ in range(min(concurrency, count))))
    return results


async def open_loop(
    client: AsyncClient,
    requests: Iterator[Planned],
    count: int,
    new_tokens: int,
    on_done: Callable[[Measured], None],
) -> list[Measured]:
    """Send each request when it is due, whatever has become of those before."""
    started = time.perf_counter()

    async def at_its_time(planned: Planned) -> Measured:
        due = started + planned.at
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        result = await one(client, planned, new_tokens, due)
        on_done(result)
        return result

    return list(await asyncio.gather(*(at_its_time(next(requests)) for _ in range(count))))


async def one(client: AsyncClient, planned: Planned, new_tokens: int, due: float) -> Measured:
    """Send one request that was due at a moment of `time.perf_counter`, and note what it took."""
    result = Measured(planned.adapter)
    last = 0.0
    options: GenerateOptions = {
        "token_ids": planned.token_ids,
        "adapter": planned.adapter or None,
        "max_new_tokens": new_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "return_token_ids": True,
    }
    if planned.lora_path is not None:
        options["lora_path"] = planned.lora_path
    try:
        async with client.stream(**options) as stream:
            async for chunk in stream:
                now = time.perf_counter()
                if not chunk.token_ids:
                    continue
                if result.tokens:
                    # Several tokens in a chunk came out of as many steps.
                    result.intervals += [(now - last) / len(chunk.token_ids)] * len(chunk.token_ids)
                else:
                    result.first_token = now - due
                result.tokens += len(chunk.token_ids)
                last = now
            result.cached_tokens = (await stream.until_done()).usage.cached_tokens
    except PolygraftError as error:
        result.error = type(error).__name__
    result.total = time.perf_counter() - due
    return result
