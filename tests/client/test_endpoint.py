"""What the client is given wrong is its own error, and nothing is sent."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from polygraft_api.v1 import inference_pb2
from polygraft_client import AsyncClient, Client, InvalidRequest, LoraPath, Unauthenticated, UsageError

from .both import all_of, done, entered
from .scripted import Script, ScriptedServer, status

SECRET = "a-secret-of-enough-characters"


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("token", f"{SECRET}\n{SECRET}"),
        ("token", f"{SECRET}é"),
        ("token", f"{SECRET}\0"),
        ("token", SECRET.encode()),
        ("address", ""),
        ("address", "no where"),
        ("address", "[::1"),
        ("address", "::1::"),
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
        ("localhost", "localhost:50051"),
        ("10.0.0.7", "10.0.0.7:50051"),
        ("[::1]", "[::1]:50051"),
        ("::1", "[::1]:50051"),
        ("fe80::a:b", "[fe80::a:b]:50051"),
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
    server: ScriptedServer, script: Script, kind: type, given: str, sent: str | None
) -> None:
    async with entered(kind(server.address, token=given)) as client:
        await done(client.model())
    assert script.metadata.get("authorization") == (None if sent is None else f"Bearer {sent}")


async def test_a_timeout_of_one_call(server: ScriptedServer, script: Script, kind: type) -> None:
    async with entered(kind(server.address)) as client:
        for call in (client.generate, client.stream):
            with pytest.raises(InvalidRequest, match="timeout: expected seconds"):
                await done(call("hi", timeout=float("nan")))
    assert script.requests == []


async def test_a_closed_client(server: ScriptedServer, kind: type) -> None:
    client = kind(server.address)
    await done(client.model())
    await done(client.close())
    await done(client.close())
    with pytest.raises(UsageError, match="the client is closed"):
        await done(client.model())
    with pytest.raises(UsageError, match="the client is closed"):
        client.stream("hi")
    with pytest.raises(UsageError, match="the client is closed"):
        await all_of(client.adapters.list())


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


@pytest.mark.parametrize("path", ["merged", "MERGED", LoraPath.MERGED])
def test_an_enum_takes_its_name(path: Any, server: ScriptedServer) -> None:
    with Client(server.address) as client:
        client.generate("hi", lora_path=path, combination_type="linear")
    (request,) = server.script.requests
    assert request.lora_path == inference_pb2.LORA_PATH_MERGED
    assert request.combination_type == inference_pb2.COMBINATION_TYPE_LINEAR


@pytest.mark.parametrize("argument", ["lora_path", "combination_type"])
@pytest.mark.parametrize("wrong", ["fused", "unknown", 3])
def test_a_wrong_name_lists_the_right_ones(argument: str, wrong: Any, server: ScriptedServer) -> None:
    with Client(server.address) as client, pytest.raises(InvalidRequest) as caught:
        client.generate("hi", **{argument: wrong})
    assert caught.value.argument == argument
    assert ("'merged'" if argument == "lora_path" else "'linear'") in str(caught.value)
    assert server.script.requests == []


def test_errors_say_what_to_do(server: ScriptedServer) -> None:
    script = server.script
    with Client(server.address) as client:
        script.failures = [
            status(grpc.StatusCode.UNAUTHENTICATED, "a token is needed", reason="UNAUTHENTICATED")
        ]
        with pytest.raises(Unauthenticated, match="give it to the client as `token`"):
            client.adapters.get("x")
        with pytest.raises(InvalidRequest, match="gRPC addresses have no scheme"):
            Client("https://host:50051")
