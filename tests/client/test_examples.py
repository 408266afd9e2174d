"""The examples run as they stand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .scripted import ScriptedServer

EXAMPLES = Path(__file__).parents[2] / "clients" / "examples"
SCRIPTS = Path(sys.executable).parent


def run(*command: object) -> str:
    path = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=os.environ | {"PATH": path}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart(server: ScriptedServer) -> None:
    shown = run(sys.executable, EXAMPLES / "python_quickstart.py", server.address)
    assert "base: one two three\n" in shown
    assert "mood: MOOD one two three  [STOP, 3 tokens]\n" in shown


def test_mixed_burst(server: ScriptedServer) -> None:
    shown = run(sys.executable, EXAMPLES / "async_mixed_burst.py", server.address)
    assert "headline: 'HEADLINE one two three'\n" in shown
    assert "3 requests, 9 tokens" in shown


@pytest.mark.skipif(
    not (SCRIPTS / "grpcurl").exists() and not shutil.which("grpcurl"), reason="needs grpcurl"
)
def test_grpcurl(server: ScriptedServer) -> None:
    shown = run(EXAMPLES / "grpcurl.sh", server.address)
    for part in ('"architecture": "llama"', '"status": "SERVING"', '"name": "mood"', '"text": "three"'):
        assert part in shown
