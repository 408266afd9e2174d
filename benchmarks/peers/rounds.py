"""Runs interleaved rounds of systems, one at a time, and drops those that fail."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.answers import Outputs, WrongAnswers, check_adapters
from benchmarks.peers.catalog import Peer, System
from benchmarks.peers.environment import last_words, python_of
from benchmarks.sides.protocol import Side

Running = tuple[Peer, System]


@dataclass(slots=True)
class Measured:
    """What a system did.

    Args:
        figures: values by case and figure, one for each counted round.
        outputs: token ids of each case's last round.
        failure: why it ended early, or "".
    """

    figures: dict[str, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(dict))
    outputs: dict[str, Outputs] = field(default_factory=dict)
    failure: str = ""

    def add(self, case: str, answer: dict[str, Any], counted: bool) -> None:
        """Keep a round's answer."""
        self.outputs[case] = answer.pop("outputs")
        if counted:
            for figure, value in answer.items():
                self.figures[case].setdefault(figure, []).append(value)


def measure(chosen: Sequence[Running], root: Path, rounds: int, cases: Sequence[str]) -> dict[str, Measured]:
    """One warm-up round, then the counted ones.

    Args:
        root: where the peers are installed.
        cases: those to run, of those that a system can.
    """
    results = {system.name: Measured() for _, system in chosen}
    with ExitStack() as stack:
        sides = {
            system.name: stack.enter_context(side)
            for peer, system in chosen
            if (side := _start(peer, system, root, results[system.name]))
        }
        for n in range(rounds + 1):
            # Who follows the slowest pays for its heat, so everybody does in turn.
            for peer, system in [*chosen[n % len(chosen) :], *chosen[: n % len(chosen)]]:
                result = results[system.name]
                if not result.failure:
                    # Nothing is new to a system in the largest case, and it takes minutes: once must do.
                    todo = [c for c in cases if c in system.cases and (n == 1 or c != "mixed-100")]
                    try:
                        _run_cases(n, sides[system.name], system, todo, result)
                    except (RuntimeError, OSError, ValueError, WrongAnswers) as error:
                        _fail(result, system, error, _log(root, peer, system))
    return results


def _log(root: Path, peer: Peer, system: System) -> Path:
    return root / peer.name / f"{system.title}-{system.precision}.log".replace(" ", "-").replace(",", "")


def _start(peer: Peer, system: System, root: Path, result: Measured) -> Side | None:
    print(f"starting {system.name}", flush=True)
    log = _log(root, peer, system)
    try:
        return Side(
            f"benchmarks.peers.{peer.name}",
            *system.arguments,
            python=python_of(peer, root),
            environment=system.environment,
            log=log,
        )
    except RuntimeError as error:
        _fail(result, system, error, log)
        return None


def _fail(result: Measured, system: System, error: Exception, log: Path) -> None:
    result.failure = f"{error} ({last_words(log)})"
    print(f"{system.name} is out: {result.failure}", flush=True)


def _run_cases(n: int, side: Side, system: System, cases: Sequence[str], result: Measured) -> None:
    for case in cases:
        answer = side.round(case)
        print(f"round {n}: {system.name:38} {case:10} {answer['tokens_per_s']:7.1f} tokens/s", flush=True)
        result.add(case, answer, counted=n > 0)
    check_adapters(result.outputs)
