"""What the client is given wrong is its own error, and nothing is sent."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from polygraft_client import AsyncClient, Client, InvalidRequest, UsageError
from tests.client.scripted import Script, ScriptedServer

SECRET = "a-secret-of-enough-characters"


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("token", f"{SECRET}\n{SECRET}"),
        ("token", f"{SECRET}é"),
        ("token", f"{SECRET}\0"),
        ("token", SECRET.encode()),
        ("address", ""),
        ("address", "nowhere"),
        ("address", ":1"),
        ("address", "127.0.0.1:"),
        ("address", "127.0.0.1:x"),
        ("address", "127.0.0.1:0"),
        ("address", "127.0.0.1:65536"),
        ("address", "http://localhost:50051"),
        ("address", "my host:1"),
        ("address", "é:1"),
        ("address", None),
        ("address", 50051),
        ("timeout", "1"),
        ("timeout", float("nan")),
        ("timeout", float("inf")),
        ("timeout", 1e300),
        ("retries", 5),
        ("retries", 1.5),
        ("retries", None),
        ("credentials", "tls"),
    ],
)
def test_an_argument_that_cant_be_used(kind: type, argument: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        kind(**{argument: value})
    assert caught.value.argument == argument
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("127.0.0.1:50051", "127.0.0.1:50051"),
        (" localhost:1\n", "localhost:1"),
        ("[::1]:50051", "[::1]:50051"),
        ("::1:50051", "[::1]:50051"),
        ("unix:/run/polygraft.sock", "unix:/run/polygraft.sock"),
        ("dns:///polygraft.example:50051", "dns:///polygraft.example:50051"),
    ],
)
def test_addresses(given: str, used: str) -> None:
    assert Client(given).address == AsyncClient(given).address == used


@pytest.mark.parametrize(
    ("given", "sent"), [(f"{SECRET}\n", SECRET), (f"\t{SECRET} \r\n", SECRET), ("", None), ("\n", None)]
)
async def test_white_space_around_the_token_isnt_sent(
    server: ScriptedServer, script: Script, given: str, sent: str | None
) -> None:
    expected = None if sent is None else f"Bearer {sent}"
    with Client(server.address, token=given) as client:
        await asyncio.to_thread(client.model)
        assert script.metadata.get("authorization") == expected
    async with AsyncClient(server.address, token=given) as other:
        await other.model()
        assert script.metadata.get("authorization") == expected


def test_a_timeout_of_one_call(server: ScriptedServer, script: Script) -> None:
    with Client(server.address) as client:
        for call in (client.generate, client.stream):
            with pytest.raises(InvalidRequest, match="timeout: expected seconds"):
                call("hi", timeout=float("nan"))
    assert script.requests == []


def test_a_closed_client(server: ScriptedServer) -> None:
    client = Client(server.address)
    client.model()
    client.close()
    client.close()
    for call in (client.model, lambda: client.stream("hi"), lambda: list(client.adapters.list())):
        with pytest.raises(UsageError, match="the client is closed"):
            call()


async def test_a_closed_async_client(server: ScriptedServer) -> None:
    client = AsyncClient(server.address)
    await client.model()
    await client.close()
    await client.close()
    with pytest.raises(UsageError, match="the client is closed"):
        await client.model()
    with pytest.raises(UsageError, match="the client is closed"):
        client.stream("hi")


def test_an_async_client_in_a_second_event_loop(server: ScriptedServer, script: Script) -> None:
    client = AsyncClient(server.address)
    streams = []

    async def first() -> None:
        await client.model()
        streams.append(client.stream("hi"))

    async def second() -> None:
        with pytest.raises(UsageError, match="belongs to another event loop"):
            await client.model()
        with pytest.raises(UsageError, match="belongs to another event loop"):
            client.stream("hi")
        with pytest.raises(UsageError, match="belongs to another event loop"):
            await streams[0].until_done()
        await client.close()

    asyncio.run(first())
    asyncio.run(second())


def test_an_async_client_without_an_event_loop(server: ScriptedServer) -> None:
    client = AsyncClient(server.address)
    with pytest.raises(UsageError, match="needs a running event loop"):
        client.stream("hi")
    # Nothing has bound it to a loop yet.
    assert asyncio.run(client.model()).architecture == "llama"


def test_a_stream_that_outlives_its_loop_goes_quietly(
    server: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    async def start() -> Any:
        stream = AsyncClient(server.address).stream("hi")
        await stream.__anext__()
        return stream

    stream = asyncio.run(start())
    del stream
    assert "Exception ignored" not in capsys.readouterr().err
