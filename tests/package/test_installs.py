"""What each way of installing can do, and what it says of the rest. Each runs the wheel with its own packages alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.client.scripted import ScriptedServer, adapter

from .conftest import Run


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        server.script.adapters = [adapter("mood")]
        yield server


@pytest.fixture
def polygraft(installed: Callable[..., Run]) -> Run:
    """`polygraft` where the extra `cli` is installed."""
    run = installed("cli")
    return lambda *arguments: run("-m", "polygraft", *arguments)


def test_it_has_none_of_the_servers_packages(installed: Callable[..., Run]) -> None:
    names = [
        "torch",
        "numpy",
        "transformers",
        "pydantic_settings",
        "psutil",
        "platformdirs",
        "jinja2",
        "matplotlib",
        "regex",
    ]
    code = f"import importlib.util as u; print([n for n in {names} if u.find_spec(n)])"
    assert installed("cli")("-c", code).stdout == "[]\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "Hello", "--raw"),
        ("generate", "Hello", "--adapter", "mood", "--stream"),
        ("score", "Hello", " world"),
        ("adapters", "list"),
        ("adapters", "list", "--json"),
        ("adapters", "show", "mood"),
        ("adapters", "load", "other"),
        ("adapters", "reload", "mood"),
        ("adapters", "unload", "mood"),
        ("bench", "--requests", "2", "--warmup", "0"),
        ("bench", "--requests", "2", "--warmup", "0", "--json"),
    ],
    ids=" ".join,
)
def test_commands_that_call_a_server(
    polygraft: Run, server: ScriptedServer, arguments: tuple[str, ...]
) -> None:
    done = polygraft(*arguments, "--server", server.address)
    assert (done.returncode, done.stderr if "bench" not in arguments else "") == (0, ""), done.stderr
    assert done.stdout


def test_a_comparison_reads_a_running_servers_metrics(polygraft: Run, server: ScriptedServer) -> None:
    done = polygraft("bench", "compare", "--server", server.address, "--metrics", "127.0.0.1:9")
    assert done.returncode != 0
    assert done.stderr.startswith("error: ")
    assert "pip install" not in done.stderr  # it got as far as the server


def test_version_and_help(polygraft: Run) -> None:
    assert polygraft("--version").stdout == "0.1.0\n"
    for command in (
        (),
        ("generate",),
        ("score",),
        ("adapters",),
        ("adapters", "check"),
        ("bench",),
        ("bench", "compare"),
        ("demo",),
    ):
        done = polygraft(*command, "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert "Usage: polygraft" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (("serve",), "polygraft serve"),
        (("serve", "--help"), "polygraft serve"),
        (("demo",), "polygraft demo"),
        (("adapters", "check", "."), "polygraft adapters check"),
        (("adapters", "convert", ".", "out"), "polygraft adapters convert"),
        (("bench", "compare"), "polygraft bench compare without --server"),
    ],
    ids=str,
)
def test_commands_that_need_the_server_say_so_in_a_line(
    polygraft: Run, arguments: tuple[str, ...], command: str
) -> None:
    done = polygraft(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(
        f'error: {command} needs the server\'s packages: pip install "polygraft[server]" ('
    )
    assert done.stderr.count("\n") == 1


def test_the_plain_install_is_the_client(installed: Callable[..., Run], server: ScriptedServer) -> None:
    run = installed()
    code = (
        "from polygraft_client import Client\n"
        f"with Client({server.address!r}) as client: print(client.generate('Hello').text)"
    )
    done = run("-c", code)
    assert (done.returncode, done.stdout) == (0, "one two three\n"), done.stderr
    done = run("-m", "polygraft", "generate", "Hello")
    assert done.returncode == 1
    assert done.stderr.startswith(
        'error: the command line needs more packages: pip install "polygraft[cli]" to call a server, '
        '"polygraft[server]" to run one ('
    )
    assert done.stderr.count("\n") == 1
