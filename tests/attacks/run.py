"""Runs every attack against one server, one after another, and reports what others felt of it.

    python -m tests.attacks [--only WORD] [--health SECONDS] [--gap SECONDS]

The server runs the default model with default settings. An attack fails if the server dies, answers a fixed
question in another way afterwards, or keeps a health check or a stream waiting for longer than the limits.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from polygraft.cli.demo.launcher import ServerProcess, serve_command
from tests.attacks import connections, folders, requests  # noqa: F401 (they fill the list)
from tests.attacks.target import ATTACKS, Target
from tests.attacks.witness import Seen, Witness, answer

SAMPLES = Path(__file__).resolve().parents[2] / "adapters"


def _run(name: str, target: Target) -> str:
    """In a process of its own, since building a large message takes time that others would seem to wait."""
    return asyncio.run(ATTACKS[name](target))  # type: ignore[arg-type]  # all attacks are coroutines


def _problems(seen: Seen, before: str, after: str, limits: argparse.Namespace) -> list[str]:
    found = [seen.errors] if seen.errors else []
    if seen.health > limits.health:
        found.append(f"health took {seen.health:.2f} s")
    if seen.gap > limits.gap:
        found.append(f"a stream waited {seen.gap:.2f} s")
    if before != after:
        found.append(f"the answer was {before!r} and is {after!r}")
    return found


async def _attack_all(target: Target, pid: int, limits: argparse.Namespace) -> int:
    before = await answer(target)
    failed = 0
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as attacker:
        for name in ATTACKS:
            if limits.only and limits.only not in name:
                continue
            started = time.monotonic()
            witness = Witness(target, pid)
            async with witness as seen:
                said = await loop.run_in_executor(attacker, _run, name, target)
            seconds = time.monotonic() - started
            problems = _problems(seen, before, await answer(target), limits)
            failed += bool(problems)
            print(f"{'FAILED' if problems else 'held  '} {name} ({seconds:.0f} s)")
            print(f"         said: {said}")
            print(
                f"         health {seen.health:.2f} s, gap {seen.gap:.2f} s, memory {seen.memory / 2**20:.0f} "
                f"MiB at most, {witness.memory() / 2**20:.0f} after"
            )
            for problem in problems:
                print(f"         problem: {problem}")
            sys.stdout.flush()
    return failed


def main() -> int:
    """Attack a server; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="attacks whose name holds this")
    parser.add_argument("--health", type=float, default=0.5, help="most seconds that a health check may take")
    parser.add_argument("--gap", type=float, default=1.5, help="most seconds between two tokens of a stream")
    limits = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        store.mkdir()
        shutil.copytree(SAMPLES / "sentiment", store / "sentiment")
        folders.add_broken_folder(store)
        with ServerProcess(serve_command("--adapters", str(store))) as server:
            addresses = server.wait_ready(300, report=lambda line: None)
            target = Target(addresses.grpc, addresses.metrics, store)
            failed = asyncio.run(_attack_all(target, server.pid, limits))
            server.stop()
    print(f"{failed} failed" if failed else "all held")
    return 1 if failed else 0
