from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from polygraft_client import AsyncClient, Client

from .scripted import Script, ScriptedServer


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def script(server: ScriptedServer) -> Script:
    return server.script


@pytest.fixture(params=[Client, AsyncClient])
def kind(request: pytest.FixtureRequest) -> type[Client] | type[AsyncClient]:
    """Each client in turn; `both` has what uses either."""
    return request.param


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address on which nobody listens, kept from others by being bound."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"
