"""Answers liveness and readiness probes."""

from __future__ import annotations

import time
from collections.abc import Callable

STALLED_SECONDS = 60.0
"""An event loop that hasn't run for this long hangs: callbacks take well under a second."""
BEAT_SECONDS = 1.0


class Probes:
    """The state of the process for `/healthz` and `/readyz`.

    The server's event loop writes it; the endpoint's thread reads it. Each field is replaced as a whole, so
    neither needs a lock.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._dead: str | None = None
        self._unready: str | None = "starting: the base model is being loaded"
        self._beat: float | None = None

    def ready(self) -> None:
        """Report that requests are answered from now on."""
        self._unready = None

    def unready(self, why: str) -> None:
        """Report that new requests are refused from now on."""
        self._unready = why

    def dead(self, why: str) -> None:
        """Report that the process can't recover and should be restarted."""
        self._dead = why

    def beat(self) -> None:
        """Report that the event loop runs; once begun, call it every `BEAT_SECONDS`."""
        self._beat = self._clock()

    def rest(self) -> None:
        """Report that the event loop ends as planned, so that no more beats are expected."""
        self._beat = None

    def unhealthy_because(self) -> str | None:
        """Return why the process should be restarted; None if it needn't be, as while it loads or drains."""
        if self._dead is not None:
            return self._dead
        beat = self._beat
        if beat is not None and (silent := self._clock() - beat) > STALLED_SECONDS:
            return f"the event loop has not run for {silent:.0f} s"
        return None

    def unready_because(self) -> str | None:
        """Return why requests should be sent elsewhere; None while they are answered."""
        return self.unhealthy_because() or self._unready
