"""Polygraft and other systems on workload W, each in an environment of its own, installed on demand.

Rounds of all systems are interleaved, so that drift of the machine cancels; one computes at a time. The exit
status is 1 if none could run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.machine import describe
from benchmarks.peers import environment
from benchmarks.peers.cases import CASES
from benchmarks.peers.catalog import Peer, catalog
from benchmarks.peers.report import markdown, summary
from benchmarks.peers.rounds import measure
from polygraft.base.model_folder import resolve_model

ROOT = Path("build/peers").resolve()


def chosen_peers(only: str, names: list[str]) -> list[str]:
    """Names of the peers to run, from a comma-separated list; all if it is empty."""
    chosen = only.split(",") if only else names
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        sys.exit(f"error: no peer {', '.join(unknown)}; there are {', '.join(names)}")
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds, after one warm-up round")
    parser.add_argument("--only", default="", metavar="PEER,...", help="some of the peers")
    parser.add_argument("--cases", default=",".join(CASES), metavar="CASE,...", help="some of the cases")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    args = parser.parse_args()
    cases = [case for case in CASES if case in args.cases.split(",")]
    if not cases or args.rounds < 1:
        parser.error(f"at least one round and one case of {', '.join(CASES)}")

    print("preparing the model and the adapters", flush=True)
    store, gguf = environment.adapters(ROOT), environment.gguf(ROOT)
    peers = catalog(ROOT, resolve_model("default"), store, gguf)
    names = chosen_peers(args.only, [peer.name for peer in peers])
    ready: list[Peer] = []
    failures: dict[str, str] = {}
    for peer in (peer for peer in peers if peer.name in names):
        try:
            environment.prepare(peer, ROOT)
            ready.append(peer)
        except environment.Unavailable as error:
            failures[peer.name] = str(error)
            print(f"{peer.name} is out: {error}", flush=True)

    pairs = [(peer, system) for peer in ready for system in peer.systems if set(system.cases) & set(cases)]
    results = measure(pairs, ROOT, args.rounds, cases)
    failures |= {name: measured.failure for name, measured in results.items() if measured.failure}
    versions = {peer.name: environment.versions(peer, ROOT) for peer in ready}
    result = summary(results, failures, versions, describe())
    print(f"\n{markdown(result, cases)}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    if not any(measured.figures for measured in results.values()):
        sys.exit("error: no system could be measured; the reasons are above")


if __name__ == "__main__":
    main()
