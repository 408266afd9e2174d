"""A worker's limits, which it sets on itself before it reads anything untrusted."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]  # its absence is what is tested

NICENESS = 10
"""The engine's threads use every core; a worker only gets what they leave."""
_WALL_PER_CPU = 10.0
"""Wall time per second of CPU time after which a worker ends itself, in case the server is gone."""


def limit_process() -> None:
    """Write no core dump, yield to the engine, and ignore signals that are meant for the server.

    A terminal sends SIGINT to the whole process group, and some supervisors do the same with SIGTERM. The
    server then drains, and its requests may still need this process. It ends when its standard input does.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    with contextlib.suppress(AttributeError, OSError):
        # A process inherits the signals that its starting thread blocked; the timers' must come through.
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
    with contextlib.suppress(AttributeError, OSError):
        os.nice(NICENESS)
    _limit("RLIMIT_CORE", 0)
    _limit("RLIMIT_NOFILE", 256)


def limit_memory(extra: int) -> None:
    """Let the process grow by at most so many bytes from its current size."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _limit("RLIMIT_AS", pages * resource.getpagesize() + extra)


def _limit(name: str, most: int) -> None:
    """Set the soft limit, at most to the hard one."""
    if resource is None:
        return
    with contextlib.suppress(AttributeError, OSError, ValueError):
        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, hard))


@contextlib.contextmanager
def limited_time(cpu_seconds: float) -> Iterator[None]:
    """End this process if the block computes for longer.

    Uses timers whose unhandled signals kill the process, so neither Python nor a library has to yield
    control. They count CPU time, so that a busy machine doesn't make a file look bad.
    """
    for timer, name, seconds in (
        ("ITIMER_PROF", "SIGPROF", cpu_seconds),
        ("ITIMER_REAL", "SIGALRM", cpu_seconds * _WALL_PER_CPU),
    ):
        if hasattr(signal, timer):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
            signal.setitimer(getattr(signal, timer), seconds)
    try:
        yield
    finally:
        for timer in ("ITIMER_PROF", "ITIMER_REAL"):
            if hasattr(signal, timer):
                signal.setitimer(getattr(signal, timer), 0)
