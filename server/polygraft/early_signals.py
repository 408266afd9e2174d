"""What SIGTERM and SIGINT do until the server takes them itself: end the process at once.

The kernel throws a signal away that process 1 of a container has no handler for, so the handlers are there
before anything slow is imported. Nothing that takes long may be imported here.
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
"""Exit statuses: of a server that was told to end before it was ready, and of one that was told so twice."""

CHILDREN_SECONDS = 1.0
"""What child processes, such as a compiler or pip, get to end by themselves."""

_POLL_SECONDS = 0.02


def end_early() -> None:
    """Let each of the signals end the process quickly, with its children. Called on the main thread alone."""
    for number in CAUGHT:
        signal.signal(number, _end)


def force_from_now() -> None:
    """Let a signal that comes while the process ends force it, where `end_early` had been called."""
    for number in CAUGHT:
        if signal.getsignal(number) is _end:
            signal.signal(number, _force)


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """Put the handlers back that were there, after somebody else's."""
    if threading.current_thread() is not threading.main_thread():  # nobody can set them there
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
    # Threads are loading or computing, and unwinding them would take as long as they need. Nothing is lost:
    # whatever is written to disk appears whole or not at all.
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
    """Process ids of a process's children and of theirs; none where there is no /proc."""
    by_parent: dict[int, list[int]] = {}
    for stat in proc.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name is in parentheses and may hold anything, spaces and parentheses too.
            by_parent.setdefault(int(_fields(stat)[1]), []).append(int(stat.parent.name))
    found: list[int] = []
    waiting = [parent]
    while waiting:
        children = by_parent.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def _runs(process: int) -> bool:
    """Whether it hasn't ended yet, also if nobody has asked for its status."""
    try:
        return _fields(Path(f"/proc/{process}/stat"))[0] not in ("Z", "X")
    except OSError:
        return False


def _fields(stat: Path) -> list[str]:
    """What follows the name: state, parent and so on."""
    return stat.read_text(errors="replace").rpartition(")")[2].split()


def _say(text: str) -> None:
    """Write past Python's streams: the handler may have interrupted somebody who writes to them."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        # RuntimeError: the handler has interrupted a write to this very stream.
        with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):
            stream.flush()
