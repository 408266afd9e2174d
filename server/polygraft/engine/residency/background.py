"""Work that goes on in slices between steps, so that it never competes with a step for the cores.

Beside a busy thread a step takes several times as long, since its own threads wait for each other; so
parsing, checking and compiling adapters happen here and not on threads of their own.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Generator

Job = Generator[bool | None, None, None]
"""Yields where it may be interrupted: True if it needs a step to run before it can go on, False if it is of
the kind that nobody waits for, and wants the server to have been idle for a while."""

STEP_SHARE = 0.06
"""Share of a step's time that background work may take after it. What it leaves in the CPU's caches costs the
next step a little more."""
IDLE_SECONDS = 0.02
"""How long it may take at a stretch while no request runs: the longest that a new one waits for it."""


class BackgroundWork:
    """Runs jobs in turn within a time budget.

    Whose turn it is goes by the time that they have had: one with long slices gets fewer of them, so that a
    small job next to a large one takes twice as long as alone, and not as long as the large one.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._ready: list[tuple[float, int, Job]] = []  # a heap, by the time that a job has had
        self._after_step: list[tuple[float, Job]] = []
        self._resting: list[tuple[float, Job]] = []
        self._order = itertools.count()
        self._had = 0.0
        """Time that the job has had whose turn was last: a new one begins with as much."""
        self._credit = 0.0

    def add(self, job: Job) -> None:
        """Queue a job; it must handle its own errors."""
        self._put(self._had, job)

    def _put(self, had: float, job: Job) -> None:
        heapq.heappush(self._ready, (had, next(self._order), job))

    def _put_back(self, jobs: list[tuple[float, Job]]) -> None:
        """Let jobs go on that have waited; what they haven't used meanwhile they don't get afterwards."""
        for had, job in jobs:
            self._put(max(had, self._had), job)
        jobs.clear()

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
        self._put_back(self._resting)

    def run_after_step(self, step_seconds: float) -> None:
        """Spend the share that a step allows; what a long slice overdraws is paid back by later steps."""
        self._put_back(self._after_step)
        self._credit = min(self._credit, 0.0) + STEP_SHARE * step_seconds
        self._credit -= self._run(self._credit)

    def run_idle(self, seconds: float = IDLE_SECONDS) -> None:
        """Spend time that no request wants."""
        self._put_back(self._after_step)
        self._credit = 0.0
        self._run(seconds)

    def _run(self, seconds: float) -> float:
        started = self._clock()
        spent = 0.0
        while self._ready and spent < seconds:
            self._had, _, job = heapq.heappop(self._ready)
            try:
                needs_step = next(job)
            except StopIteration:
                needs_step, ended = None, True
            else:
                ended = False
            before, spent = spent, self._clock() - started
            had = self._had + spent - before
            if ended:
                continue
            if needs_step is None:
                self._put(had, job)
            else:
                (self._after_step if needs_step else self._resting).append((had, job))
        return spent
