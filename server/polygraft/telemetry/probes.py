"""What liveness and readiness probes are told."""

from __future__ import annotations

import time
from collections.abc import Callable

STALLED_SECONDS = 60.0
"""An event loop that hasn't run for so long hangs: callbacks take well under a second."""
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
        """Requests are answered from here on."""
        self._unready = None

    def unready(self, why: str) -> None:
        """New requests are refused from here on."""
        self._unready = why

    def dead(self, why: str) -> None:
        """The process can't recover and should be restarted."""
        self._dead = why

    def beat(self) -> None:
        """The event loop runs. Call it every `BEAT_SECONDS`, after the first call."""
        self._beat = self._clock()

    def rest(self) -> None:
        """The event loop ends as planned, and beats no more."""
        self._beat = None

    def unhealthy_because(self) -> str | None:
        """Why the process should be restarted; None while it is well, be it loading or draining."""
        if self._dead is not None:
            return self._dead
        beat = self._beat
        if beat is not None and (silent := self._clock() - beat) > STALLED_SECONDS:
            return f"the event loop has not run for {silent:.0f} s"
        return None

    def unready_because(self) -> str | None:
        """Why requests should go elsewhere; None while they are answered."""
        return self.unhealthy_because() or self._unready
