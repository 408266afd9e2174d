from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from typer.testing import CliRunner, Result

from polygraft.cli.app import app
from tests.client.scripted import Script, ScriptedServer

Invoke = Callable[..., Result]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLYGRAFT_SERVER", "POLYGRAFT_ADMIN_TOKEN", "POLYGRAFT_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def script(server: ScriptedServer) -> Script:
    return server.script


@pytest.fixture
def invoke() -> Invoke:
    """Run `polygraft` in this process."""
    return lambda *args, **kwargs: CliRunner().invoke(app, list(map(str, args)), **kwargs)


@pytest.fixture
def call(invoke: Invoke, server: ScriptedServer) -> Invoke:
    """Run `polygraft` against the scripted server."""
    return lambda *args, **kwargs: invoke(*args, "--server", server.address, **kwargs)
