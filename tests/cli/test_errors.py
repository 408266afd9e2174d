"""Every failure is one line on stderr and an exit status, never a traceback."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from polygraft.cli.app import exit_status
from polygraft.errors import BaseModelError, ConfigError, PolygraftError
from tests.client.scripted import Script, status

from .conftest import Invoke


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["--nonsense"], "No such option"),
        (["generate"], "Missing argument"),
        (["generate", "hi", "--top-k", "many"], "--top-k"),
        (["adapters", "show", "x", "--nearest", "99"], "--nearest"),
        (["generate", "hi", "--raw", "--top-k", "-1", "--server", "127.0.0.1:1"], "--top-k: "),
        (
            ["generate", "hi", "--stop-token-id", "-1", "--raw", "--server", "127.0.0.1:1"],
            "--stop-token-id: ",
        ),
        (["generate", "hi", "--server", "http://localhost"], "--server: expected HOST or HOST:PORT"),
        (["generate", "hi", "--timeout", "nan"], "--timeout: expected seconds"),
        (["adapters", "list", "--token", "é"], "--token: holds a character"),
        (["serve", "--block-size", "0"], "--block-size: Input should be greater than or equal to 1"),
        (["serve", "--dtype", "int3", "--listen"], "Option '--listen' requires an argument"),
        (["serve", "--dtype", "int3", "--threads", "0"], "--threads: "),
        (["serve", "--kv-cache-bytes", "plenty"], "--kv-cache-bytes: "),
        (["serve", "--nonsense", "1"], "No such option"),
        (["serve", "--listen", "nowhere"], "--listen: expected HOST:PORT"),
        (["serve", "--listen", "0.0.0.0:0"], "--admin-token: needed"),
        (["serve", "--adapters", "no/such/folder"], "--adapters: no such folder"),
        (["demo", "--adapters", "no/such/folder"], "--adapters: no such file"),
    ],
)
def test_misuse_names_the_flag(invoke: Invoke, arguments: list[str], says: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_secrets_are_not_repeated(invoke: Invoke) -> None:
    result = invoke("serve", "--admin-token", "tiny-secret")
    assert result.stderr == "error: --admin-token: must have at least 16 characters\n"


def test_broken_settings_file(invoke: Invoke, tmp_path: Path) -> None:
    broken = tmp_path / "polygraft.toml"
    broken.write_text("model = ")
    result = invoke("serve", env={"POLYGRAFT_CONFIG": str(broken)})
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --config: ")


def test_nobody_listens(invoke: Invoke) -> None:
    result = invoke("generate", "hi", "--server", "127.0.0.1:1")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: 127.0.0.1:1: no server is listening there; `polygraft serve` starts one\n"
    )


def test_errors_of_the_server(call: Invoke, script: Script) -> None:
    script.failures = [status(grpc.StatusCode.UNAUTHENTICATED, "a token is needed", reason="UNAUTHENTICATED")]
    result = call("adapters", "list")
    assert (result.exit_code, result.stderr) == (
        1,
        "error: a token is needed; give --token, or set POLYGRAFT_ADMIN_TOKEN\n",
    )


def test_line_breaks_in_an_error_are_folded(call: Invoke, script: Script) -> None:
    script.failures = [status(grpc.StatusCode.NOT_FOUND, "one\n  two", reason="R")]
    assert call("adapters", "unload", "x").stderr == "error: one two\n"


def test_exit_status() -> None:
    assert exit_status(ConfigError("--x", "wrong")) == 2
    assert exit_status(BaseModelError("wrong")) == 1
    assert exit_status(PolygraftError("wrong")) == 1
    assert exit_status(OSError("wrong")) == 1
    assert exit_status(ZeroDivisionError("a fault of ours keeps its traceback")) is None
