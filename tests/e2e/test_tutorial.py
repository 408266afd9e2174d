"""The tutorial, run from its first snippet to its last, with the default model and a server of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from polygraft.cli.demo.launcher import ServerProcess, serve_command
from tests.docs.documents import snippets

from .test_snippets import ADDRESS, SCRIPTS, TUTORIAL

pytestmark = pytest.mark.real

SERVE = ["polygraft", "serve"]


def test_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    address = ""
    printed = []
    with ExitStack() as stack:
        for snippet in (one for one in snippets() if one.document == TUTORIAL):
            language, _, title = snippet.language.partition(" title=")
            words = shlex.split(snippet.text) if language == "sh" else []
            if title:
                title = title.strip('"')
            if title.endswith(".py"):
                (tmp_path / title).write_text(snippet.text)
            elif words[:2] == SERVE:
                server = stack.enter_context(ServerProcess(serve_command(*words[2:])))
                address = server.wait_ready(120, report=lambda line: None).grpc
                monkeypatch.setenv("POLYGRAFT_SERVER", address)
            elif words[:2] != ["make", "setup"]:
                program = ["sh", "-ec"] if language == "sh" else [sys.executable, "-c"]
                text = snippet.text.replace(ADDRESS, address)
                done = subprocess.run([*program, text], capture_output=True, text=True, check=False)
                assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
                printed.append(done.stdout)
    trained, checked, asked, called, updated = printed
    assert trained.startswith("loss ")
    assert "shout" in checked
    assert "shout" in asked
    assert "shout -> " in called
    answer = updated.strip().splitlines()[-1]
    assert answer == answer.upper(), "the longer training shows"
