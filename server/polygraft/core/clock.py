"""The time that requests are measured and limited by."""

from __future__ import annotations

import time
from collections.abc import Callable


class Clock:
    """Seconds since some start. Everything of one engine reads the same clock; tests set what it reads."""

    def __init__(self, read: Callable[[], float] = time.monotonic) -> None:
        self.read = read

    def __call__(self) -> float:
        """The seconds now."""
        return self.read()
