"""A server in a process of its own, which ends with the context it is used in."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from polygraft.errors import PolygraftError

READY_LINE = re.compile(r"polygraft ready: grpc=(?P<grpc>\S+)(?: metrics=(?P<metrics>\S+))?")
STOP_SECONDS = 60.0  # longer than the server's own drain timeout, which bounds a healthy stop
POLL_SECONDS = 0.2
LOG_LINES = 30  # as many of the last lines as a failure shows


class ServerFailed(PolygraftError):
    """The server didn't start, or didn't end well."""

    reason = "SERVER_FAILED"


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a server listens, as HOST:PORT; `metrics` is "" if it serves none."""

    grpc: str
    metrics: str


def parse_ready(line: str) -> Addresses | None:
    """Read the line that a server prints when it is ready; None is any other line."""
    found = READY_LINE.fullmatch(line.strip())
    return Addresses(found["grpc"], found["metrics"] or "") if found else None


class ServerProcess:
    """Runs a server while the context lasts; leaving it waits until the process is gone.

    Args:
        command: what to run.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.log: deque[str] = deque(maxlen=LOG_LINES)
        self._command = command
        self._ready: queue.SimpleQueue[Addresses | None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(  # noqa: S603 (no shell)
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        self._reader = threading.Thread(target=self._read, name="server-log", daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end(STOP_SECONDS)

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    def wait_ready(self, timeout: float, report: Callable[[str], None]) -> Addresses:
        """Wait for the server's ready line.

        Args:
            timeout: seconds.
            report: called now and then with the last line that the server said.

        Raises:
            ServerFailed: it ended first, or took too long.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                addresses = self._ready.get(timeout=POLL_SECONDS)
            except queue.Empty:
                report(self.log[-1] if self.log else "")
                continue
            if addresses is None:
                raise ServerFailed(f"the server ended with status {self._process.wait()} before it was ready")
            return addresses
        raise ServerFailed(f"the server wasn't ready after {timeout:.0f} s")

    def stop(self) -> None:
        """Ask the server to drain and wait for its end; raises ServerFailed unless that is status 0."""
        running = self._process.poll() is None
        status = self._end(STOP_SECONDS)
        if not running or status != 0:
            when = "when asked to stop" if running else "by itself"
            raise ServerFailed(f"the server ended {when}, with status {status}")

    def _end(self, patience: float) -> int:
        """Make sure that the process is gone; return its exit status."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._reader.join()
        return status

    def _read(self) -> None:
        """Keep the last lines and look for the one that says ready; None after the last."""
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self.log.append(line.rstrip())
                if addresses := parse_ready(line):
                    self._ready.put(addresses)
        self._ready.put(None)


def serve_command(*flags: str) -> list[str]:
    """The command that serves on ports of its own choice."""
    ports = ("--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0")
    return [sys.executable, "-m", "polygraft", "serve", *ports, *flags]
