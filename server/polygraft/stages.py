"""The stages of a start, and the seconds that each of them took."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

REMINDER_SECONDS = 5.0
"""After this time without a line, a start looks as if it hung."""


class Stages:
    """Times the stages of a start for the log.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of the block to a stage."""
        began = self._clock()
        try:
            yield
        finally:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + self._clock() - began

    def summary(self) -> str:
        """The seconds since the start, and each stage's: `9.1 s: model 5.2, adapters 3.1, other 0.8`."""
        total = self._clock() - self._started
        other = total - sum(self._seconds.values())
        parts = [f"{stage} {seconds:.1f}" for stage, seconds in (*self._seconds.items(), ("other", other))]
        return f"{total:.1f} s: {', '.join(parts)}"


@contextmanager
def reminders(what: str, say: Callable[[str], None], every: float = REMINDER_SECONDS) -> Iterator[None]:
    """Say every few seconds that the block still runs: `still compiling (5 s)`.

    `say` is called on a thread of its own, and not any more once the block has ended.
    """
    ended, began = threading.Event(), time.monotonic()

    def remind() -> None:
        while not ended.wait(every):
            say(f"still {what} ({time.monotonic() - began:.0f} s)")

    thread = threading.Thread(target=remind, name=f"reminders of {what}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
