"""The server's end of one worker: starts it, asks it, and ends it if it doesn't answer."""

from __future__ import annotations

import logging
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import polygraft
from polygraft.engine.sandbox.frames import BadFrame, Frame, pack, read

log = logging.getLogger(__name__)

_MODULE = "polygraft.engine.sandbox.worker"
_PASSED_ON = (
    "PYTHONHOME",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "SYSTEMROOT",
    "TMPDIR",
    "TZ",
    "LANG",
    "LC_ALL",
)
"""Variables that a worker gets: those that Python needs to start, and the time zone for templates."""
_START_SECONDS = 30.0
_ANSWER_HEADER_BYTES = 2**20


class WorkerUnavailable(Exception):
    """No worker can be started."""


class WorkerStopped(Exception):
    """The worker ended, or was ended, before it answered.

    Args:
        problem: why, as a predicate whose subject is the file: "used more than 2 s ...".
    """

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


class WorkerTimedOut(Exception):
    """No answer came in time, though the CPU time wasn't used up; the worker is gone.

    The machine is busy, or somebody stopped the process: nothing is known against the file.
    """


class WorkerProcess:
    """One worker, started at the first question and again after it has ended. For one caller at a time.

    Args:
        memory_bytes: what it may allocate beyond what it starts with.
    """

    def __init__(self, memory_bytes: int) -> None:
        self._memory = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[..., WorkerProcess] | None = None

    def ask(self, question: Frame, *, cpu_seconds: float, seconds: float, most_bytes: int) -> Frame:
        """Ask a question and wait for the answer. Callable on any thread.

        Args:
            cpu_seconds: limit of the answer, beyond which the worker ends itself.
            seconds: how long to wait for it.
            most_bytes: of the answer's parts.

        Raises:
            WorkerUnavailable: it can't be started.
            WorkerStopped: no answer came; the worker is gone.
            WorkerTimedOut: it didn't come in time.
        """
        fresh = self._process is None or self._process.poll() is not None
        process = self._start() if fresh else self._process
        assert process is not None
        limit = seconds + (_START_SECONDS if fresh else 0.0)
        data = pack(Frame({**question.header, "cpu_seconds": cpu_seconds}, question.parts))
        try:
            answer = _exchange(process, data, time.monotonic() + limit, most_bytes)
        except TimeoutError:
            self.end()
            raise WorkerTimedOut(f"no answer within {seconds:g} s") from None
        except (BadFrame, OSError) as error:
            raise self._ended(cpu_seconds, error) from None
        except BaseException:
            self.end()  # its late answer would be taken for the next question's
            raise
        if answer.header.get("ends"):
            self.end()
        return answer

    def end(self) -> None:
        """End it, if there is one."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None

    def _start(self) -> subprocess.Popen[bytes]:
        self.end()
        command = [sys.executable, "-P", "-s", "-m", _MODULE, str(self._memory)]
        try:
            process = subprocess.Popen(  # noqa: S603 - our own module, and no shell
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                bufsize=0,
            )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise WorkerUnavailable(str(error)) from error
        assert process.stdin is not None
        assert process.stdout is not None
        os.set_blocking(process.stdin.fileno(), False)
        os.set_blocking(process.stdout.fileno(), False)
        self._process = process
        self._finalizer = weakref.finalize(self, _end, process)
        return process

    def _ended(self, cpu_seconds: float, error: Exception) -> WorkerStopped | WorkerTimedOut:
        process = self._process
        assert process is not None
        try:
            status = process.wait(1.0)  # its pipes close a moment before it exits
        except subprocess.TimeoutExpired:
            status = None
        self.end()
        if status == -getattr(signal, "SIGPROF", 0):
            return WorkerStopped(f"used more than {cpu_seconds:g} s of CPU time")
        if status == -getattr(signal, "SIGALRM", 0):
            return WorkerTimedOut("it got too little processor time")
        if status is None:
            return WorkerStopped(f"made its process send an answer that can't be read ({error})")
        name = (
            signal.Signals(-status).name
            if status < 0 and -status in {*signal.Signals}
            else f"status {status}"
        )
        most = self._memory // 2**20
        return WorkerStopped(
            f"ended its process ({name}): it crashed, or needed more than {most} MiB of memory"
        )


def _environment() -> dict[str, str]:
    root = str(Path(polygraft.__file__).resolve().parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {**passed, "PYTHONPATH": path, "PYTHONUTF8": "1", "TOKENIZERS_PARALLELISM": "false"}


def _exchange(process: subprocess.Popen[bytes], data: bytes, deadline: float, most_bytes: int) -> Frame:
    """Write a question and read its answer. Raises TimeoutError, BadFrame, OSError."""
    assert process.stdin is not None
    assert process.stdout is not None
    written, answer = process.stdin.fileno(), process.stdout.fileno()
    left = memoryview(data)
    with selectors.DefaultSelector() as selector:
        selector.register(written, selectors.EVENT_WRITE)
        while left:
            _wait(selector, deadline)
            left = left[os.write(written, left[: 2**20]) :]
        selector.unregister(written)
        selector.register(answer, selectors.EVENT_READ)

        def take(count: int) -> bytes:
            pieces = bytearray()
            while len(pieces) < count:
                _wait(selector, deadline)
                piece = os.read(answer, min(count - len(pieces), 2**20))
                if not piece:
                    break
                pieces += piece
            return bytes(pieces)

        frame = read(take, _ANSWER_HEADER_BYTES, most_bytes)
    if frame is None:
        raise BadFrame("it has ended")
    return frame


def _wait(selector: selectors.BaseSelector, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0 or not selector.select(left):
        raise TimeoutError


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker and release its pipes and its process entry."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait()
