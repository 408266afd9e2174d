"""Handles SIGTERM and SIGINT until the server does so itself: they end the process at once.

The kernel drops signals that process 1 of a container has no handler for, so the handlers are installed
before anything slow is imported. Nothing slow may be imported here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

CAUGHT = (signal.SIGTERM, signal.SIGINT)
ENDED, FORCED = 0, 1
"""Exit statuses after one signal before the server was ready, and after two."""

CHILDREN_SECONDS = 1.0
"""How long child processes, such as a compiler or pip, get to end by themselves."""

_POLL_SECONDS = 0.02


def end_early() -> None:
    """Make each signal end the process and its children quickly. Call only on the main thread."""
    for number in CAUGHT:
        signal.signal(number, _end)


def force_from_now() -> None:
    """If `end_early` was called, make a signal during shutdown end the process immediately."""
    for number in CAUGHT:
        if signal.getsignal(number) is _end:
            signal.signal(number, _force)


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """Restore the current handlers afterwards, whatever is installed inside."""
    if threading.current_thread() is not threading.main_thread():  # handlers can't be set there
        yield
        return
    before = {number: signal.getsignal(number) for number in CAUGHT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    for caught in CAUGHT:
        signal.signal(caught, _force)
    _say(f"{signal.Signals(number).name}: ending before the server is ready\n")
    end_children(CHILDREN_SECONDS)
    # Unwinding would wait for threads that load or compute. Nothing is lost: files appear on disk complete or
    # not at all.
    _flush()
    os._exit(ENDED)


def _force(number: int, frame: FrameType | None) -> None:
    os._exit(FORCED)


def end_children(patience: float) -> None:
    """End this process's descendants: with SIGTERM, and after `patience` seconds with SIGKILL."""
    children = descendants(os.getpid())
    for number in (signal.SIGTERM, signal.SIGKILL):
        for child in children:
            with contextlib.suppress(OSError):
                os.kill(child, number)
        until = time.monotonic() + patience
        while time.monotonic() < until and any(map(_runs, children)):
            time.sleep(_POLL_SECONDS)
        children = [child for child in children if _runs(child)]


def descendants(parent: int, proc: Path = Path("/proc")) -> list[int]:
    """Ids of all descendants of a process; none if there is no /proc."""
    by_parent: dict[int, list[int]] = {}
    for stat in proc.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name is in parentheses and may contain anything, spaces and parentheses included.
            by_parent.setdefault(int(_fields(stat)[1]), []).append(int(stat.parent.name))
    found: list[int] = []
    waiting = [parent]
    while waiting:
        children = by_parent.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def _runs(process: int) -> bool:
    """Whether a process still runs; a zombie doesn't."""
    try:
        return _fields(Path(f"/proc/{process}/stat"))[0] not in ("Z", "X")
    except OSError:
        return False


def _fields(stat: Path) -> list[str]:
    """The fields after the name: state, parent and so on."""
    return stat.read_text(errors="replace").rpartition(")")[2].split()


def _say(text: str) -> None:
    """Write past Python's streams, since the handler may have interrupted a write to them."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        # RuntimeError: the handler interrupted a write to this very stream.
        with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):
            stream.flush()
