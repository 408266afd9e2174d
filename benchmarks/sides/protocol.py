"""How a benchmark talks to its sides: a line in starts a round, a line of JSON out says how it went."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self


def answer_rounds(run: Callable[[str], dict[str, Any]]) -> None:
    """In a side: say that it is ready, then run a round for each line on standard input."""
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(line.strip())), flush=True)


class Side:
    """A side's process. It idles while another side's round runs.

    Args:
        module: to run with `python -m`.
        python: of the environment that the side's packages are in.
        environment: variables besides this process's own.
        log: file for what the side says on standard error; None leaves it on this process's.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        python: str | Path = sys.executable,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        errors = log.open("wb") if log else None
        try:
            self._process = subprocess.Popen(
                [python, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | (environment or {}),
            )
        finally:
            if errors:
                errors.close()
        self._read_until("ready")

    def _read_until(self, start: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return line
        raise RuntimeError(f"a side ended with status {self._process.wait()}")

    def round(self, what: str) -> dict[str, Any]:
        """Run one round."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        result: dict[str, Any] = json.loads(self._read_until("{"))
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        # A side that died left a line unread.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
