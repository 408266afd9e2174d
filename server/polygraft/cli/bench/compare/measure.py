"""Runs a comparison: every path in every round, one after another, so that drift meets all of them."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from polygraft.cli.bench.compare import scraped
from polygraft.cli.bench.compare.cells import Cell, Mix, Path
from polygraft.cli.bench.compare.result import Copy, Figures, Pairs, Phase, Round, Size, figures
from polygraft.cli.bench.plan import plan
from polygraft.cli.bench.run import Measured, closed_loop, one
from polygraft_client import Adapter, AsyncClient, LoraPath, PolygraftError

Done = Callable[[float], None]
"""Is told how much of the work is done, in the units of `work`."""
SWITCH_ROUNDS = 20
SETTLE_SECONDS = 5.0
"""How long a change of the load may take to be noticed, and answered by merging."""
STEADY_SECONDS = 8.0
DEVIATION_SECONDS = 60.0
"""How long an idle server gets to measure its copies."""


class RequestFailed(PolygraftError):
    """A request of the comparison failed."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What all runs share."""

    prompt_tokens: int
    new_tokens: int
    rounds: int
    vocabulary_size: int


class Runner:
    """Puts loads on one server.

    Args:
        metrics: HOST:PORT of its metrics, or "".
        done: called after each run.
    """

    def __init__(self, client: AsyncClient, metrics: str, settings: Settings, done: Done) -> None:
        self._client = client
        self._metrics = metrics
        self._settings = settings
        self._done = done
        self._seed = 0

    async def cells(self, cells: Sequence[Cell], paths: Sequence[Path]) -> list[Figures]:
        """Measure each cell on each path."""
        found = []
        warm: set[str] = set()
        for cell in cells:
            if cell.mix.name not in warm:
                warm.add(cell.mix.name)
                await self._warm_up(cell.mix, paths)
            rounds: dict[Path, list[Round]] = {path: [] for path in paths}
            for n in range(self._settings.rounds):
                self._seed += 1
                first = n % len(paths)
                for path in (*paths[first:], *paths[:first]):
                    rounds[path].append(await self._run(cell, path))
                    self._done(work(cell.concurrency))
            found += [
                figures(cell.mix.name, len(cell.mix.adapters), cell.concurrency, path, rounds[path])
                for path in paths
            ]
        return found

    async def _warm_up(self, mix: Mix, paths: Sequence[Path]) -> None:
        """Have every copy made, and every path run once."""
        for path in paths:
            if path is Path.MERGED:
                for name in mix.adapters:
                    await self._client.generate(
                        token_ids=[1], adapter=name, lora_path=LoraPath.MERGED, max_new_tokens=1
                    )
            load = Cell(mix, 4).load(
                path, self._settings.prompt_tokens, 4, self._settings.vocabulary_size, seed=1_000_000
            )
            _check(await closed_loop(self._client, plan(load), 8, 4, 4, lambda _: None))

    async def _run(self, cell: Cell, path: Path) -> Round:
        settings = self._settings
        load = cell.load(
            path, settings.prompt_tokens, settings.new_tokens, settings.vocabulary_size, self._seed
        )
        before = scraped.read(self._metrics)
        started = time.perf_counter()
        results = await closed_loop(
            self._client,
            plan(load),
            max(2, cell.concurrency),
            cell.concurrency,
            settings.new_tokens,
            lambda _: None,
        )
        seconds = time.perf_counter() - started
        after = scraped.read(self._metrics)
        counts = None if before is None or after is None else after.since(before)
        return Round(_check(results), seconds, counts)

    async def pairs(self, name: str, paths: Sequence[Path], rounds: int) -> list[Pairs]:
        """One request at a time, the paths in turn."""
        latency: dict[Path, list[float]] = {path: [] for path in paths}
        cell = Cell(Mix("1", (name,)), 1)
        await self._warm_up(cell.mix, paths)
        for n in range(rounds):
            first = n % len(paths)
            for path in (*paths[first:], *paths[:first]):
                result = await self._single(cell, path, 2_000_000 + n)
                latency[path].append(statistics.median(result.intervals))
            self._done(len(paths) * work(1))
        base = latency[Path.BASE]
        return [
            Pairs(
                path,
                rounds,
                1000 * statistics.median(own),
                statistics.median(a / b for a, b in zip(own, base, strict=True)),
            )
            for path, own in latency.items()
        ]

    async def _single(self, cell: Cell, path: Path, seed: int) -> Measured:
        settings = self._settings
        load = cell.load(path, settings.prompt_tokens, settings.new_tokens, settings.vocabulary_size, seed)
        result = await one(self._client, next(plan(load)), settings.new_tokens, time.perf_counter())
        return _check([result])[0]

    async def switch_ms(self, names: Sequence[str]) -> float:
        """The median of first tokens behind another adapter's merged step, less that behind the same's."""
        taken: dict[bool, list[float]] = {True: [], False: []}
        prompt = [1, 2, 3, 4]
        for name in names[:2]:
            await self._client.generate(
                token_ids=prompt, adapter=name, lora_path=LoraPath.MERGED, max_new_tokens=1
            )
        for n in range(SWITCH_ROUNDS):
            # The other one; then itself again.
            for again in (False, True):
                started = time.perf_counter()
                await self._client.generate(
                    token_ids=prompt, adapter=names[n % 2], lora_path=LoraPath.MERGED, max_new_tokens=1
                )
                taken[again].append(time.perf_counter() - started)
        self._done(work(1))
        return 1000 * (statistics.median(taken[False]) - statistics.median(taken[True]))

    async def sizes(self, adapters: Sequence[Adapter], rounds: int) -> list[Size]:
        """One request at a time with an adapter of each rank and of each number of virtual tokens."""
        chosen: dict[tuple[str, int], Adapter] = {}
        for adapter in adapters:
            if adapter.virtual_tokens:
                chosen.setdefault(("virtual tokens", adapter.virtual_tokens), adapter)
            elif adapter.rank and adapter.mergeable and not adapter.merged_only:
                chosen.setdefault(("rank", adapter.rank), adapter)
        sides = [
            (kind, size, adapter, path)
            for (kind, size), adapter in sorted(chosen.items(), key=lambda item: item[0])
            for path in ((Path.UNMERGED, Path.MERGED) if kind == "rank" else (Path.UNMERGED,))
        ]
        latency: list[list[float]] = [[] for _ in sides]
        for n in range(rounds + 1):
            for at, (_, _, adapter, path) in enumerate(sides):
                result = await self._single(Cell(Mix("1", (adapter.name,)), 1), path, 3_000_000 + n)
                if n:
                    latency[at].append(statistics.median(result.intervals))
        self._done(work(1))
        return [
            Size(kind, size, adapter.name, path, 1000 * statistics.median(own))
            for (kind, size, adapter, path), own in zip(sides, latency, strict=True)
        ]

    async def changing_load(self, names: Sequence[str], concurrency: int) -> list[Phase]:
        """One hot adapter, then several alike, then the hot one again, under each fixed path and AUTO."""
        several = tuple(names[:8])
        phases = [
            ("one hot", Mix("1", several[:1])),
            (f"{len(several)} even", Mix("even", several)),
            ("one hot again", Mix("1", several[:1])),
        ]
        found = []
        for path in (Path.UNMERGED, Path.MERGED, Path.AUTO):
            await self._warm_up(Mix("even", several), [path])
            for at, (phase, mix) in enumerate(phases):
                early, steady = await self._phase(Cell(mix, concurrency), path, 4_000_000 + at)
                found.append(Phase(phase, path, steady, early))
                self._done(work(concurrency) * 4)
        return found

    async def _phase(self, cell: Cell, path: Path, seed: int) -> tuple[float, float]:
        """Tokens a second in the first seconds of a load, and after them."""
        settings = self._settings
        load = cell.load(path, settings.prompt_tokens, settings.new_tokens, settings.vocabulary_size, seed)
        requests = plan(load)
        started = time.perf_counter()
        early_end, end = started + SETTLE_SECONDS, started + SETTLE_SECONDS + STEADY_SECONDS
        tokens = {True: 0, False: 0}

        async def worker() -> None:
            while time.perf_counter() < end:
                planned = next(requests)
                assert planned.lora_path is not None
                async with self._client.stream(
                    token_ids=planned.token_ids,
                    adapter=planned.adapter,
                    lora_path=planned.lora_path,
                    max_new_tokens=settings.new_tokens,
                    ignore_eos=True,
                    temperature=0.0,
                    return_token_ids=True,
                ) as stream:
                    async for chunk in stream:
                        now = time.perf_counter()
                        if now < end:
                            tokens[now < early_end] += len(chunk.token_ids)

        await asyncio.gather(*(worker() for _ in range(cell.concurrency)))
        return tokens[True] / SETTLE_SECONDS, tokens[False] / STEADY_SECONDS

    async def copies(self, names: Sequence[str]) -> list[Copy]:
        """What the server tells of its merged copies, once it has had the time to measure them."""
        deadline = time.monotonic() + DEVIATION_SECONDS
        found = []
        for name in names:
            while True:
                adapter = await self._client.adapters.get(name)
                copy = adapter.merged
                measured = copy is not None and copy.deviation is not None
                if measured or copy is None or copy.state != "READY" or time.monotonic() > deadline:
                    break
                await asyncio.sleep(0.5)
            if copy is not None and copy.state == "READY":
                off = copy.deviation
                found.append(
                    Copy(
                        name, adapter.rank, copy.memory_bytes, copy.dtype, copy.merge_seconds,
                        off.mean if off else None, off.largest if off else None,
                        off.greedy_agreement if off else None,
                    )
                )  # fmt: skip
        return found


def work(concurrency: int) -> float:
    """About how long a run takes, in units of a progress bar: steps share the reading of weights."""
    return 1 + concurrency / 4


def _check(results: list[Measured]) -> list[Measured]:
    errors = {result.error for result in results if result.error is not None}
    if errors:
        raise RequestFailed(f"requests of the comparison failed: {', '.join(sorted(errors))}")
    return results
