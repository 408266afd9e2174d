"""What a worker may take: it limits itself before it reads anything that isn't to be trusted."""

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
"""The engine's threads use every core: a worker takes what they leave."""
_WALL_PER_CPU = 10.0
"""A worker ends itself after so many times the seconds that it may compute, should the server be gone."""


def limit_process() -> None:
    """Leave no core dump, give way to the engine, and don't end with signals that are meant for the server.

    A terminal sends SIGINT to the whole process group, and some supervisors send SIGTERM so. The server then
    drains, and requests that wait for this process are part of that. It ends when its standard input does.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    with contextlib.suppress(AttributeError, OSError):
        # What the thread that started this one has blocked stays blocked, and the timers' signals must come.
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
    with contextlib.suppress(AttributeError, OSError):
        os.nice(NICENESS)
    _limit("RLIMIT_CORE", 0)
    _limit("RLIMIT_NOFILE", 256)


def limit_memory(extra: int) -> None:
    """Let the process grow by so many bytes beyond what it has now, and no more."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _limit("RLIMIT_AS", pages * resource.getpagesize() + extra)


def _limit(name: str, most: int) -> None:
    """Lower the soft limit, which may be raised again up to the hard one."""
    if resource is None:
        return
    with contextlib.suppress(AttributeError, OSError, ValueError):
        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, hard))


@contextlib.contextmanager
def limited_time(cpu_seconds: float) -> Iterator[None]:
    """End this process if what is inside computes for longer.

    By timers whose signals nothing handles: neither Python nor a library has to give up control. CPU time and
    not the clock's, so that a busy machine doesn't make a file look bad.
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
