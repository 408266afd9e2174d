"""Each status becomes one error, with its details."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from polygraft_client import (
    AsyncClient,
    Cancelled,
    Client,
    ConnectError,
    DeadlineExceeded,
    FieldViolation,
    InvalidArgument,
    PolygraftError,
    ResourceExhausted,
    StatusError,
    Unavailable,
    Unimplemented,
)
from polygraft_client._status import STATUS_ERRORS

from .both import done, entered
from .scripted import Script, ScriptedServer, status


@pytest.fixture
def client(server: ScriptedServer):
    with Client(server.address, retries=0) as client:
        yield client


def test_every_code_has_its_error() -> None:
    own = {grpc.StatusCode.OK, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED}
    assert set(STATUS_ERRORS) == set(grpc.StatusCode) - own
    assert set(STATUS_ERRORS.values()) == set(StatusError.__subclasses__())


@pytest.mark.parametrize("code", STATUS_ERRORS, ids=lambda code: code.name)
async def test_status_becomes_its_error(
    server: ScriptedServer, script: Script, kind: type, code: grpc.StatusCode
) -> None:
    answer = status(code, "what happened", reason="SOME_REASON", metadata={"adapter": "x"})
    script.failures = [answer] * 2
    async with entered(kind(server.address, retries=0)) as client:
        for call in (client.generate, lambda prompt: client.stream(prompt).until_done()):
            with pytest.raises(STATUS_ERRORS[code], match="what happened") as caught:
                await done(call("Hello"))
            assert type(caught.value) is STATUS_ERRORS[code]
            assert caught.value.reason == "SOME_REASON"
            assert caught.value.metadata == {"adapter": "x"}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, Cancelled),
        (grpc.StatusCode.UNAVAILABLE, ConnectError),
    ],
)
def test_codes_of_the_transport(
    client: Client, script: Script, code: grpc.StatusCode, expected: type[PolygraftError]
) -> None:
    script.failures = [status(code, "it broke")]
    with pytest.raises(expected, match=f"^{client.address}: it broke$"):
        client.model()


def test_violations_are_unpacked(client: Client, script: Script) -> None:
    wrong = [("sampling.top_p", "must be in (0, 1]"), ("prompt", "is empty")]
    script.failures = [status(grpc.StatusCode.INVALID_ARGUMENT, "bad", reason="R", violations=wrong)]
    with pytest.raises(InvalidArgument) as caught:
        client.generate("Hello")
    assert caught.value.violations == tuple(FieldViolation(*pair) for pair in wrong)
    assert caught.value.retry_after is None


def test_retry_after_is_unpacked(client: Client, script: Script) -> None:
    script.failures = [status(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", reason="R", retry_after=1.5)]
    with pytest.raises(ResourceExhausted) as caught:
        client.generate("Hello")
    assert caught.value.retry_after == 1.5


def test_details_of_another_status_are_ignored(client: Client, script: Script) -> None:
    lying = status(grpc.StatusCode.NOT_FOUND, "not here", reason="R")
    script.failures = [lying._replace(code=grpc.StatusCode.INVALID_ARGUMENT)]  # type: ignore[attr-defined]
    with pytest.raises(InvalidArgument) as caught:
        client.generate("Hello")
    assert caught.value.reason == ""


async def test_nobody_listens(nobody: str, kind: type) -> None:
    async with entered(kind(nobody, retries=0)) as client:
        for call in (client.model, lambda: client.stream("Hello").until_done()):
            with pytest.raises(ConnectError, match=nobody) as caught:
                await done(call())
            assert caught.value.address == nobody


def test_unavailable_is_tried_again(server: ScriptedServer, script: Script) -> None:
    draining = status(grpc.StatusCode.UNAVAILABLE, "draining", reason="DRAINING")
    script.failures = [draining, draining]
    with Client(server.address, retries=2) as client:
        assert client.generate("Hello").text == "one two three"
        assert len(script.requests) == 3
        script.failures = [draining]
        with pytest.raises(Unavailable):
            client.adapters.unload("mood")


async def fails(address: str, expected: type[PolygraftError], says: str, **options: object) -> None:
    """Both clients raise the same error."""
    for kind in (Client, AsyncClient):
        async with entered(kind(address, **options)) as client:  # type: ignore[arg-type]
            with pytest.raises(expected) as caught:
                await done(client.generate("Hello"))
        assert says in str(caught.value)


@pytest.mark.parametrize("limited", ["receive", "send"])
async def test_a_message_that_is_too_large_names_the_setting(limited: str) -> None:
    with ScriptedServer([(f"grpc.max_{limited}_message_length", 3)]) as server:
        await fails(server.address, ResourceExhausted, "the server's --max-message-bytes")


async def test_a_method_that_the_server_lacks() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        says = f"{address}: Method not found! The server there is older than this client, or isn't Polygraft"
        await fails(address, Unimplemented, says)
    finally:
        server.stop(None).wait()


async def test_nobody_listens_says_how_to_start_one(nobody: str, tmp_path: Path) -> None:
    for address in (nobody, f"unix:{tmp_path / 'none.sock'}"):
        says = f"{address}: no server is listening there; `polygraft serve` starts one"
        await fails(address, ConnectError, says, retries=0)


async def test_tls_to_a_server_without(server: ScriptedServer) -> None:
    credentials = grpc.ssl_channel_credentials()
    await fails(server.address, ConnectError, "doesn't speak TLS", credentials=credentials, retries=0)


@pytest.fixture
def http1() -> Iterator[str]:
    """Where a server answers everything as one for HTTP/1 does."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:  # the test is over
                    return
                with connection:
                    connection.recv(65_536)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(10)


async def test_a_port_that_speaks_http_1(http1: str) -> None:
    await fails(http1, ConnectError, "speaks HTTP/1, not gRPC", retries=0)


async def test_a_call_that_takes_longer_than_its_timeout(server: ScriptedServer, script: Script) -> None:
    script.hold = threading.Event()
    says = f"{server.address}: no answer within the call's timeout"
    await fails(server.address, DeadlineExceeded, says, timeout=0.2)
