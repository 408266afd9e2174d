"""What a decode step costs by rows, distinct adapters, rank and context, stepping the engine in process.

Each curve is fitted by a line through all of its points but the last; where growth is no worse than linear,
the last point doesn't lie above it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.suite.experiment import Experiment, Plot, Row
from benchmarks.suite.stores import lora_store, rank_store
from polygraft.base.loader import inspect_without_weights
from polygraft.config import ServerConfig
from polygraft.engine.load_engine import load_engine
from polygraft_types.requests import AdapterRef, Request, StoppingParams

STEPS = 12
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
ADAPTERS = (1, 2, 4, 8, 16, 32)
RANKS = (4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (64, 256, 512, 1024, 2048)


class Steps:
    """Decode steps of a plan, timed by one engine."""

    def __init__(self, store: Path) -> None:
        self._engine = load_engine(
            ServerConfig(
                adapters=store, quantization="int8", threads=2, kv_cache_bytes=2**30, prefix_caching=False
            )
        )
        self._sent = 0

    def milliseconds(self, adapters: Sequence[str], context: int = 64) -> float:
        """Median of a step with one row for each adapter named, all with as many tokens of context."""
        for name in adapters:
            self._sent += 1
            self._engine.submit(
                Request(
                    str(self._sent),
                    tuple(1000 + (self._sent * 7919 + i) % 30_000 for i in range(context)),
                    adapters=(AdapterRef(name),) if name else (),
                    stopping=StoppingParams(max_new_tokens=context + STEPS + 2, ignore_eos=True),
                )
            )
        seconds: list[float] = []
        while len(seconds) < STEPS:
            started = time.perf_counter()
            stats = self._engine.step().stats
            if stats is not None and stats.prefill_rows == 0 and stats.decode_rows == len(adapters):
                seconds.append(time.perf_counter() - started)
        for n in range(len(adapters)):
            self._engine.abort(str(self._sent - n))
        return 1000 * statistics.median(seconds)


def run(rounds: int) -> list[Row]:
    base = inspect_without_weights("default")
    with tempfile.TemporaryDirectory() as folder:
        names = lora_store(Path(folder) / "store", base, max(ADAPTERS))
        by_rank = rank_store(Path(folder) / "store", base, RANKS, 4)
        steps = Steps(Path(folder) / "store")
        curves: dict[str, dict[int, Sequence[str]]] = {
            "rows, base": {n: [""] * n for n in ROWS},
            "rows, over 8 adapters": {n: [names[i % 8] for i in range(n)] for n in ROWS},
            "adapters, in 32 rows": {n: [names[i % n] for i in range(32)] for n in ADAPTERS},
            "rank, 16 rows over 4 adapters": {r: [by_rank[r][i % 4] for i in range(16)] for r in RANKS},
        }
        rows: list[Row] = []
        for curve, plans in curves.items():
            rows += _measure(curve, {n: _side(steps, plan) for n, plan in plans.items()}, rounds)
        plans = {n: _side(steps, [""] * 4, n) for n in CONTEXTS}
        return rows + _measure("tokens of context, 4 rows", plans, rounds)


def _side(steps: Steps, adapters: Sequence[str], context: int = 64) -> Callable[[], float]:
    return lambda: steps.milliseconds(adapters, context)


def _measure(curve: str, sides: dict[int, Callable[[], float]], rounds: int) -> list[Row]:
    times: dict[int, list[float]] = {n: [] for n in sides}
    for number in range(rounds + 1):
        for n, side in sides.items():
            step = side()
            if number:
                times[n].append(step)
    medians = {n: statistics.median(found) for n, found in times.items()}
    fixed, slope = fit(list(medians)[:-1], list(medians.values())[:-1])
    print(f"  {curve}:", {n: round(t, 1) for n, t in medians.items()}, flush=True)
    return [
        {
            "curve": curve,
            "n": n,
            "step, ms": t,
            "line, ms": fixed + slope * n,
            "÷ line": t / (fixed + slope * n),
        }
        for n, t in medians.items()
    ]


def fit(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """(a, b) of a + b x with the least squares of relative errors, b at least 0."""
    weights = 1 / np.array(ys)
    a, b = np.linalg.lstsq(np.stack([weights, weights * np.array(xs)], 1), np.ones(len(ys)), rcond=None)[0]
    return (float(a), float(b)) if b > 0 else (float(np.mean(ys)), 0.0)


EXPERIMENT = Experiment("step-costs", run, Plot("n", ("step, ms", "line, ms"), logarithmic=True, by="curve"))
