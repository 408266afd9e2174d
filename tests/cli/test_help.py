"""Help, version, and what asking for them must not cost."""

import subprocess
import sys
from importlib.metadata import version

import pytest

from .conftest import Invoke


@pytest.mark.parametrize(
    ("command", "shows"),
    [
        ([], ["serve", "generate", "score", "adapters", "demo"]),
        (["generate"], ["--adapter", "--temperature", "--json", "--chat", "POLYGRAFT_SERVER"]),
        (["adapters"], ["list", "show", "load", "unload", "reload", "check"]),
        (["adapters", "show"], ["--nearest", "POLYGRAFT_ADMIN_TOKEN"]),
        (["demo"], ["--max-new-tokens", "--kv-cache-bytes"]),
    ],
)
def test_help(invoke: Invoke, command: list[str], shows: list[str]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert [word for word in shows if word not in result.output] == []


def test_help_never_shows_the_token(invoke: Invoke) -> None:
    result = invoke("adapters", "list", "--help", env={"POLYGRAFT_ADMIN_TOKEN": "very-secret-token"})
    assert "very-secret-token" not in result.output


def test_help_of_serve_shows_the_settings(
    invoke: Invoke, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = invoke("serve", "--help")
    assert result.exit_code == 0
    for flag in ("--kv-cache-bytes", "--max-num-seqs", "--adapters", "--admin-token"):
        assert flag in result.output


@pytest.mark.parametrize("command", [[], ["adapters"]])
def test_no_command_shows_the_commands(invoke: Invoke, command: list[str]) -> None:
    result = invoke(*command)
    assert result.exit_code == 2
    assert "Commands" in result.output
    assert "error" not in result.stderr


def test_version(invoke: Invoke) -> None:
    assert invoke("--version").output == f"{version('polygraft')}\n"


def test_the_command_line_imports_no_torch() -> None:
    code = "import sys, polygraft.cli.app; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_module_is_the_command(invoke: Invoke) -> None:
    command = [sys.executable, "-m", "polygraft", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stdout == f"{version('polygraft')}\n"
