"""Notices if the engine's thread hangs or has ended."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Callable

from polygraft.engine.engine_loop import EngineLoop

log = logging.getLogger(__name__)

_LOOKS = 8
"""Minimum number of checks within the time that a turn may take."""


class Watchdog:
    """Checks from its own thread that the engine's thread makes progress.

    It counts its own checks, not clock time, so a process that was stopped and continued, or got no CPU time,
    doesn't count as hung.

    Args:
        thread: the one that runs `loop`.
        timeout: seconds that a command, or a step with its background work, may take; 0 for no limit.
        alarm: called once with what is wrong, on the watchdog's thread.
    """

    def __init__(
        self, loop: EngineLoop, thread: threading.Thread, timeout: float, alarm: Callable[[str], None]
    ) -> None:
        self._loop = loop
        self._watched = thread
        self._timeout = timeout
        self._alarm = alarm
        self._stop = threading.Event()

    def start(self) -> None:
        """Start checking."""
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Stop checking."""
        self._stop.set()

    def _run(self) -> None:
        pause = min(1.0, self._timeout / _LOOKS) if self._timeout else 1.0
        seen, looks = -1, 0
        while not self._stop.wait(pause):
            if not self._watched.is_alive():
                self._alarm("the engine's thread has ended")
                return
            turn = self._loop.turn
            looks = looks + 1 if turn == seen and not self._loop.resting else 0
            seen = turn
            if self._timeout and looks * pause >= self._timeout:
                log.critical(
                    "the engine has been in one step for %g s (--step-timeout):\n%s",
                    self._timeout,
                    _stack_of(self._watched),
                )
                self._alarm(f"a step hangs: it has taken more than {self._timeout:g} s")
                return


def _stack_of(thread: threading.Thread) -> str:
    """Where a thread is now."""
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else "it has no Python frame"
