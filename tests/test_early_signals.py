"""A server that is told to end while it starts ends at once, also as process 1 of a container."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from polygraft.early_signals import descendants

SECONDS = 120.0  # for a machine that is busy with something else
SERVE = [sys.executable, "-m", "polygraft", "serve", "--listen", "127.0.0.1:0", "--metrics", "off"]
AS_PROCESS_1 = ["unshare", "--pid", "--fork", "--mount-proc"]


@functools.cache
def may_unshare() -> bool:
    """Whether this user may make a process that is number 1."""
    return shutil.which("unshare") is not None and not subprocess.call(
        [*AS_PROCESS_1, "true"], stderr=subprocess.DEVNULL
    )


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            yield process
        finally:
            process.kill()


def handles(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    status = Path(f"/proc/{process}/status").read_text()
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def until_handled(process: int, number: signal.Signals) -> None:
    until = time.monotonic() + SECONDS
    while not handles(process, number):
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_it_ends_before_it_has_loaded_anything(number: signal.Signals, llama: Path) -> None:
    with started([*SERVE, "--model", str(llama)]) as process:
        until_handled(process.pid, signal.SIGTERM)
        process.send_signal(number)
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert out == ""
    assert err == f"{number.name}: ending before the server is ready\n"


def test_it_ends_while_the_model_is_loading(llama: Path) -> None:
    with started([*SERVE, "--model", str(llama)]) as process:
        assert process.stderr is not None
        assert any("loading the base" in line for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert "Traceback" not in err
    assert "ready" not in out


def test_process_1_hears_it_too(llama: Path) -> None:
    if not may_unshare():
        pytest.skip("this user may not make a process 1")
    with started([*AS_PROCESS_1, *SERVE, "--model", str(llama)]) as outside:
        until = time.monotonic() + SECONDS
        while not (inside := descendants(outside.pid)):
            assert time.monotonic() < until
            time.sleep(0.005)
        status = Path(f"/proc/{inside[0]}/status").read_text()
        assert any(line.split()[0] == "NSpid:" and line.split()[-1] == "1" for line in status.splitlines())
        until_handled(inside[0], signal.SIGTERM)
        os.kill(inside[0], signal.SIGTERM)
        outside.communicate(timeout=SECONDS)
    assert outside.returncode == 0


STARTING = """
import os, signal, subprocess, sys, time
from polygraft import early_signals
early_signals.CHILDREN_SECONDS = {seconds}
early_signals.end_early()
child = subprocess.Popen(["sh", "-c", "{trap} sleep 1000 & sleep 1000"])
print(child.pid, flush=True)
time.sleep(1000)
"""


def start(trap: str, seconds: float) -> list[str]:
    return [sys.executable, "-c", STARTING.format(trap=trap, seconds=seconds)]


def until_gone(processes: list[int]) -> None:
    until = time.monotonic() + SECONDS
    while any(
        Path(f"/proc/{process}/cmdline").exists() and Path(f"/proc/{process}/cmdline").read_bytes()
        for process in processes
    ):
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("trap", ["", "trap '' TERM;"])
def test_its_children_end_with_it(trap: str) -> None:
    with started(start(trap, 0.2)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        until = time.monotonic() + SECONDS
        while len(children := descendants(process.pid)) < 3:
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.wait(SECONDS)
        assert process.returncode == 0
        until_gone(children)


def test_a_second_signal_waits_for_nobody() -> None:
    with started(start("trap '' TERM;", 1000.0)) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            until = time.monotonic() + SECONDS
            while len(descendants(process.pid)) < 3:
                assert time.monotonic() < until
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert process.stderr is not None
            assert "ending" in process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(SECONDS) == 1
        finally:
            for left in (*descendants(child), child):
                os.kill(left, signal.SIGKILL)


def test_ending_no_children_takes_no_time() -> None:
    code = "from polygraft.early_signals import end_children; end_children(1000.0)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=SECONDS).returncode == 0


def test_whose_children_they_are(tmp_path: Path) -> None:
    for process, parent, name in ((2, 1, "a"), (3, 2, "b) R 9 ("), (4, 3, "c d"), (5, 1, "e"), (6, 9, "f")):
        (tmp_path / str(process)).mkdir()
        (tmp_path / str(process) / "stat").write_text(f"{process} ({name}) S {parent} 1 1\n")
    (tmp_path / "self").mkdir()
    assert sorted(descendants(2, tmp_path)) == [3, 4]
    assert sorted(descendants(1, tmp_path)) == [2, 3, 4, 5]
    assert descendants(1, tmp_path / "none") == []


def test_the_handlers_come_before_the_slow_imports() -> None:
    code = (
        "import sys, polygraft.early_signals as e; "
        "sys.exit(bool({'typer', 'pydantic', 'grpc', 'torch', 'asyncio'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
