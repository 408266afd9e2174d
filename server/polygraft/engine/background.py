"""Work that goes on in slices between steps, so that it never competes with a step for the cores.

Beside a busy thread a step takes several times as long, since its own threads wait for each other; so
parsing, checking and compiling adapters happen here and not on threads of their own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator

Job = Generator[bool | None, None, None]
"""Yields where it may be interrupted: True if it needs a step to run before it can go on, False if it is of
the kind that nobody waits for, and wants the server to have been idle for a while."""

STEP_SHARE = 0.06
"""Share of a step's time that background work may take after it. What it leaves in the CPU's caches costs the
next step a little more."""
IDLE_SECONDS = 0.02
"""How long it may take at a stretch while no request runs: the longest that a new one waits for it."""


class BackgroundWork:
    """Runs jobs in turn within a time budget."""

    def __init__(self) -> None:
        self._ready: deque[Job] = deque()
        self._after_step: list[Job] = []
        self._resting: list[Job] = []
        self._credit = 0.0

    def add(self, job: Job) -> None:
        """Queue a job; it must handle its own errors."""
        self._ready.append(job)

    @property
    def has_work(self) -> bool:
        """Whether any job could go on now."""
        return bool(self._ready)

    @property
    def idle(self) -> bool:
        """Whether no job is left that anybody waits for."""
        return not self._ready and not self._after_step

    @property
    def resting(self) -> bool:
        """Whether jobs are left that nobody waits for."""
        return bool(self._resting)

    def wake_resting(self) -> None:
        """The server has been idle for a while: let the jobs go on that have waited for it."""
        self._ready.extend(self._resting)
        self._resting.clear()

    def run_after_step(self, step_seconds: float) -> None:
        """Spend the share that a step allows; what a long slice overdraws is paid back by later steps."""
        self._ready.extend(self._after_step)
        self._after_step.clear()
        self._credit = min(self._credit, 0.0) + STEP_SHARE * step_seconds
        self._credit -= self._run(self._credit)

    def run_idle(self, seconds: float = IDLE_SECONDS) -> None:
        """Spend time that no request wants."""
        self._ready.extend(self._after_step)
        self._after_step.clear()
        self._credit = 0.0
        self._run(seconds)

    def _run(self, seconds: float) -> float:
        started = time.perf_counter()
        spent = 0.0
        while self._ready and spent < seconds:
            job = self._ready.popleft()
            try:
                needs_step = next(job)
            except StopIteration:
                pass
            else:
                if needs_step is None:
                    self._ready.append(job)
                else:
                    (self._after_step if needs_step else self._resting).append(job)
            spent = time.perf_counter() - started
        return spent
