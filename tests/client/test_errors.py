"""Each status becomes one error, with its details."""

from __future__ import annotations

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
    InvalidRequest,
    PolygraftError,
    ResourceExhausted,
    StatusError,
    Unavailable,
)
from polygraft_client._status import STATUS_ERRORS

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
    server: ScriptedServer, client: Client, script: Script, code: grpc.StatusCode
) -> None:
    answer = status(code, "what happened", reason="SOME_REASON", metadata={"adapter": "x"})
    script.failures = [answer] * 4
    for call in (client.generate, lambda prompt: client.stream(prompt).until_done()):
        with pytest.raises(STATUS_ERRORS[code], match="what happened") as caught:
            call("Hello")
        assert type(caught.value) is STATUS_ERRORS[code]
        assert caught.value.reason == "SOME_REASON"
        assert caught.value.metadata == {"adapter": "x"}
    async with AsyncClient(server.address, retries=0) as other:
        with pytest.raises(STATUS_ERRORS[code], match="what happened"):
            await other.generate("Hello")
        with pytest.raises(STATUS_ERRORS[code], match="what happened"):
            await other.stream("Hello").until_done()


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


async def test_nobody_listens(nobody: str) -> None:
    with Client(nobody, retries=0) as client, pytest.raises(ConnectError, match=nobody) as caught:
        client.generate("Hello")
    assert caught.value.address == nobody
    async with AsyncClient(nobody, retries=0) as other:
        with pytest.raises(ConnectError, match=nobody):
            await other.stream("Hello").until_done()
        with pytest.raises(ConnectError, match=nobody):
            await other.model()


def test_unavailable_is_tried_again(server: ScriptedServer, script: Script) -> None:
    draining = status(grpc.StatusCode.UNAVAILABLE, "draining", reason="DRAINING")
    script.failures = [draining, draining]
    with Client(server.address, retries=2) as client:
        assert client.generate("Hello").text == "one two three"
        assert len(script.requests) == 3
        script.failures = [draining]
        with pytest.raises(Unavailable):
            client.adapters.unload("mood")


def test_retries_are_bounded() -> None:
    with pytest.raises(InvalidRequest, match="retries"):
        Client(retries=5)
