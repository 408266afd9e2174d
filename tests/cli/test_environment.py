"""What surrounds a command: consoles that can't show everything, readers that leave, closed streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client.scripted import ScriptedServer

from .conftest import Invoke

EMOJI = "\N{PILE OF POO} done"


@pytest.fixture
def said() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        server.script.words = [EMOJI]
        yield server


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "polygraft", *arguments]
    return subprocess.run(command, check=False, capture_output=True, timeout=120, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("streaming", ["--stream", "--no-stream"])
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
)
def test_a_console_that_lacks_a_character(
    said: ScriptedServer, environment: dict[str, str], streaming: str
) -> None:
    flags = ("--server", said.address, "--raw", streaming)
    done = run("generate", "hi", *flags, env=os.environ | environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"\\U0001f4a9 done\n"
    done = run("generate", "hi", *flags, "--json", env=os.environ | environment)
    last = done.stdout if streaming == "--no-stream" else done.stdout.splitlines()[-1]
    found = json.loads(last)
    assert (found.get("generation") or found)["text"] == EMOJI


def test_a_console_that_has_it_shows_it(said: ScriptedServer) -> None:
    done = run("generate", "hi", "--server", said.address, "--raw", env=os.environ | {"PYTHONUTF8": "1"})
    assert done.stdout.decode() == f"{EMOJI}\n"


def test_standard_input_that_isnt_utf8(said: ScriptedServer) -> None:
    done = run("generate", "-", "--server", said.address, "--raw", input=b"\xff")
    assert done.returncode == 2
    assert done.stderr == b"error: Invalid value for prompt: standard input isn't UTF-8\n"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = run("generate", "-", "--server", said.address, "--raw", input=EMOJI.encode(), env=environment)
    assert done.returncode == 0
    assert said.script.requests[-1].prompt == EMOJI


@pytest.mark.parametrize("streaming", ["--stream", "--no-stream"])
def test_a_reader_that_has_left(said: ScriptedServer, streaming: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [
        sys.executable,
        "-m",
        "polygraft",
        "generate",
        "hi",
        "--server",
        said.address,
        "--raw",
        streaming,
    ]
    done = subprocess.run(command, check=False, stdout=writer, stderr=subprocess.PIPE, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_is_full(said: ScriptedServer) -> None:
    command = [sys.executable, "-m", "polygraft", "generate", "hi", "--server", said.address, "--raw"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, check=False, stdout=full, stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 1
    assert done.stderr == b"error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&-", "0<&- 1>&- 2>&-"])
def test_closed_streams(said: ScriptedServer, closed: str) -> None:
    line = f"{sys.executable} -m polygraft generate hi --server {said.address} --raw {closed}"
    done = subprocess.run(["sh", "-c", line], check=False, capture_output=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout == (b"" if "1>&-" in closed else f"{EMOJI}\n".encode())
    assert done.stderr == b""


def test_an_error_without_standard_error_isnt_an_answer() -> None:
    line = f"{sys.executable} -m polygraft generate hi --server 127.0.0.1:1 --raw 2>&-"
    done = subprocess.run(["sh", "-c", line], check=False, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, b"")


@pytest.mark.parametrize("how", ["variable", "flag"])
def test_an_empty_server_or_token_is_an_unset_one(said: ScriptedServer, how: str) -> None:
    if how == "variable":
        environment = os.environ | {"POLYGRAFT_SERVER": "", "POLYGRAFT_ADMIN_TOKEN": ""}
        done = run("adapters", "list", "--server", said.address, env=environment)
    else:
        done = run("adapters", "list", "--server", said.address, "--token", "")
    assert done.returncode == 0, done.stderr
    assert "authorization" not in said.script.metadata
    nobody = run("adapters", "list", "--server", "")
    assert b"127.0.0.1:50051" in nobody.stderr or nobody.returncode == 0


@pytest.mark.parametrize("arguments", [("serve",), ("adapters", "check", ".")])
def test_no_folder_for_temporary_files(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.gettempdir", none)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(
        "error: TMPDIR: no folder for temporary files can be written; set it to one"
    )
    assert result.stderr.count("\n") == 1


def test_empty_variables_dont_reach_libraries() -> None:
    code = (
        "from polygraft.cli.environment import prepare; import os; prepare(); "
        "print([n for n in ('HOME', 'XDG_CACHE_HOME', 'POLYGRAFT_CACHE', 'OTHER') if n in os.environ])"
    )
    environment = os.environ | {"HOME": "", "XDG_CACHE_HOME": "", "POLYGRAFT_CACHE": "", "OTHER": ""}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)
    assert done.stdout == b"['OTHER']\n"
