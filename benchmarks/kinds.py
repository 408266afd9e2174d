"""What each kind of adapter costs a decode step of 16 rows, against the base alone in the same run.

    OMP_NUM_THREADS=2 python -m benchmarks.kinds [--quantization int8] [--rounds 3] [--only LoRA DoRA]

All rows use one adapter of the kind, or four: the same weights under four names, which the engine keeps
apart. Kinds take turns, and each step is divided by the base's just before it. Each row's prompt is its own,
the same in every round, so that after the first (warm-up) the prefix cache has it. Prints a table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from benchmarks.kind_adapters import write_kinds
from polygraft.base.loader import inspect_without_weights
from polygraft.config import ServerConfig
from polygraft.engine.engine import Engine
from polygraft.engine.request import AdapterRef, Request, StoppingParams

ROWS, CONTEXT, STEPS = 16, 64, 12
DISTINCT = (1, 4)
LIMIT = 1.35


class Steps:
    """Decode steps of one engine with every kind loaded."""

    def __init__(self, config: ServerConfig) -> None:
        self.engine = Engine.from_config(config)
        self._sent = count(1)

    def milliseconds(self, adapters: Sequence[str | None]) -> float:
        """Median of a step with one row for each adapter named."""
        ids = []
        for row, name in enumerate(adapters):
            ids.append(str(next(self._sent)))
            prompt = tuple(1000 + (row * 7919 + i) % 30_000 for i in range(CONTEXT))
            stopping = StoppingParams(max_new_tokens=CONTEXT + STEPS, ignore_eos=True)
            named = () if name is None else (AdapterRef(name),)
            self.engine.submit(Request(ids[-1], prompt, adapters=named, stopping=stopping))
        seconds: list[float] = []
        while len(seconds) < STEPS:
            started = time.perf_counter()
            stats = self.engine.step().stats
            if stats is not None and stats.prefill_rows == 0 and stats.decode_rows == len(adapters):
                seconds.append(time.perf_counter() - started)
        for id in ids:
            self.engine.abort(id)
        return 1000 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="KIND", help="leave the other kinds out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        kinds = write_kinds(store, inspect_without_weights("default"), arguments.only)
        for name in kinds.values():
            for copy in range(1, max(DISTINCT)):
                (store / f"{name}-{copy}").mkdir()
                for file in (store / name).iterdir():
                    os.link(file, store / f"{name}-{copy}" / file.name)
        steps = Steps(
            ServerConfig(
                adapters=store, quantization=arguments.quantization, dtype=arguments.dtype, threads=2,
                kv_cache_bytes=3 * 2**29,
            )
        )  # fmt: skip
        served = steps.engine.adapters.registry
        ratios: dict[tuple[str, int], list[float]] = {}
        for number in range(arguments.rounds + 1):
            for kind, name in kinds.items():
                # Beside each kind, since the machine drifts within a round as well.
                base = steps.milliseconds([None] * ROWS)
                for distinct in DISTINCT:
                    names = [f"{name}-{n}" if n else name for n in range(distinct)]
                    step = steps.milliseconds([names[i * distinct // ROWS] for i in range(ROWS)])
                    if number:
                        ratios.setdefault((kind, distinct), []).append(step / base)
        print(f"base alone, last: {base:.1f} ms\n")
        print("| kind | compiled, KB | " + " | ".join(f"step ÷ base, {n} adapters" for n in DISTINCT) + " |")
        print("|---" * (2 + len(DISTINCT)) + "|")
        for kind, name in kinds.items():
            cells = [statistics.median(ratios[kind, distinct]) for distinct in DISTINCT]
            shown = " | ".join(f"{ratio:.2f}{' over the limit' * (ratio > LIMIT)}" for ratio in cells)
            print(f"| {kind} | {served.get(name).compiled_bytes / 1000:,.0f} | {shown} |")


if __name__ == "__main__":
    main()
