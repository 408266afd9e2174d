"""The benchmark suite: every experiment, its figures as JSON and in docs/performance.md."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from benchmarks.machine import describe
from benchmarks.suite import (
    adapter_sizes,
    limits,
    long_prompts,
    many_adapters,
    merging,
    open_loop,
    precisions,
    prefix_cache,
    step_costs,
)
from benchmarks.suite.document import insert, publish, table

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        precisions.EXPERIMENT,
        limits.EXPERIMENT,
        many_adapters.EXPERIMENT,
        adapter_sizes.RANK_EXPERIMENT,
        adapter_sizes.VIRTUAL_TOKENS_EXPERIMENT,
        long_prompts.EXPERIMENT,
        prefix_cache.EXPERIMENT,
        merging.EXPERIMENT,
        open_loop.EXPERIMENT,
        step_costs.EXPERIMENT,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="experiments"
    )
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds after the warm-up")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "bench", help="folder for the figures in JSON"
    )
    parser.add_argument(
        "--document", type=Path, help="write tables and plots into it, as docs/performance.md"
    )
    args = parser.parse_args()
    # The engines in this process take as many threads as the servers.
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        print(f"{name}:", flush=True)
        started = time.perf_counter()
        rows = EXPERIMENTS[name].run(args.rounds)
        print(f"{table(rows)}\n  {time.perf_counter() - started:.0f} s\n", flush=True)
        result = {"machine": describe(), "rounds": args.rounds, "rows": rows}
        (args.out / f"{name}.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        if args.document:
            publish(EXPERIMENTS[name], rows, args.document)
    if args.document:
        insert(args.document, "machine", table([describe()]))


if __name__ == "__main__":
    main()
