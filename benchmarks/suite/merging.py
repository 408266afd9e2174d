"""What merging costs: the first answer of an idle server, a switch, and the others' tokens meanwhile."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.suite.experiment import Experiment, Row, loop, serving
from benchmarks.suite.stores import lora_store
from polygraft.base.loader import inspect_without_weights
from polygraft_client import AsyncClient, LoraPath

ADAPTERS = 16
STREAMS = 8
WINDOW_SECONDS = 4.0
IDLE_ROUNDS = 12


async def first_token(client: AsyncClient, name: str, path: LoraPath) -> float:
    """Milliseconds of one request for one token."""
    started = time.perf_counter()
    await client.generate(token_ids=[1, 2, 3, 4], adapter=name, lora_path=path, max_new_tokens=1)
    return 1000 * (time.perf_counter() - started)


async def idle(client: AsyncClient, names: list[str]) -> Row:
    """First tokens of a server that does nothing else."""
    fresh, again, other, unmerged = [], [], [], []
    for n in range(IDLE_ROUNDS):
        name, before = names[n % len(names)], names[(n - 1) % len(names)]
        unmerged.append(await first_token(client, name, LoraPath.UNMERGED))
        fresh.append(await first_token(client, name, LoraPath.MERGED))  # two copies fit, so this one is new
        again.append(await first_token(client, name, LoraPath.MERGED))
        await first_token(client, before, LoraPath.MERGED)
        other.append(await first_token(client, name, LoraPath.MERGED))
    return {
        "unmerged, ms": statistics.median(unmerged),
        "merged, copy to be made, ms": statistics.median(fresh),
        "merged, ms": statistics.median(again),
        "merged, after a switch, ms": statistics.median(other),
    }


async def busy(client: AsyncClient, names: list[str], rounds: int) -> Row:
    """Inter-token latency of side paths in windows with merging and in windows without, in turn."""
    merging = False
    intervals: dict[bool, list[float]] = {True: [], False: []}
    merges = 0
    ended = False

    async def stream(at: int) -> None:
        while not ended:
            last = None
            async with client.stream(
                token_ids=list(range(10 + at, 42 + at)), adapter=names[at], lora_path=LoraPath.UNMERGED,
                max_new_tokens=400, ignore_eos=True, return_token_ids=True,
            ) as chunks:  # fmt: skip
                async for chunk in chunks:
                    now = time.perf_counter()
                    if last is not None and chunk.token_ids:
                        intervals[merging].append((now - last) / len(chunk.token_ids))
                    last = now
                    if ended:
                        break

    async def merge_one_after_another() -> None:
        nonlocal merges
        while merging:
            name = names[STREAMS + merges % (len(names) - STREAMS)]
            await client.adapters.update(name, merged=True)
            await client.adapters.update(name, merged=False)
            merges += 1

    streams = [asyncio.create_task(stream(at)) for at in range(STREAMS)]
    await asyncio.sleep(WINDOW_SECONDS)
    intervals[False].clear()
    for _ in range(4 * rounds):
        merging = True
        task = asyncio.create_task(merge_one_after_another())
        await asyncio.sleep(WINDOW_SECONDS)
        merging = False
        await task
        await asyncio.sleep(WINDOW_SECONDS)
    ended = True
    await asyncio.gather(*streams)
    row: Row = {"merges": merges}
    for percentile in (50, 99):
        meanwhile, alone = (1000 * float(np.percentile(intervals[m], percentile)) for m in (True, False))
        row[f"others' ITL p{percentile} without merging, ms"] = alone
        row[f"others' ITL p{percentile} while merging, ms"] = meanwhile
        row[f"ratio, p{percentile}"] = meanwhile / alone
    return row


def run(rounds: int) -> list[Row]:
    """Both, in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        names = lora_store(store, inspect_without_weights("default"), ADAPTERS)
        with serving(
            "--adapters", str(store), "--quantization", "none", "--merged-bytes", "450MiB"
        ) as addresses:  # two copies

            async def measure() -> Row:
                async with AsyncClient(addresses.grpc) as client:
                    await first_token(client, names[0], LoraPath.MERGED)
                    return await idle(client, names) | await busy(client, names, rounds)

            row = loop().run(measure())
    return [{"what": what, "figure": figure} for what, figure in row.items()]


EXPERIMENT = Experiment("merging", run)
