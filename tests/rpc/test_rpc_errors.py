"""What callers see when something goes wrong, and what they don't."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from polygraft import errors
from polygraft.rpc.status import CODES
from polygraft.telemetry.logging import configure_logging
from polygraft_api.v1 import adapters_pb2
from polygraft_api.v1 import inference_pb2 as pb
from polygraft_client import AsyncClient, NotFound, ResourceExhausted
from tests.rpc.conftest import Serve, Served, details_of, trailer
from tests.rpc.test_rpc_status import OURS, example

GENERATE = "/polygraft.v1.InferenceService/Generate"
STREAM = "/polygraft.v1.InferenceService/GenerateStream"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logging("debug", stream=stream)
    yield stream
    root.handlers[:] = before
    root.setLevel(level)
    logging.getLogger("polygraft").setLevel(logging.NOTSET)


async def finish(call: Any) -> None:
    if hasattr(call, "read"):
        async for _ in call:
            pass
    else:
        await call


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await finish(call)
    return caught.value


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("when", ["unary", "stream", "late", "command"])
async def test_every_error_reaches_the_caller_as_its_code(
    served: Served, kind: type[errors.PolygraftError], when: str
) -> None:
    error = example(kind)
    if when == "command":
        served.engine.adapter_error = error
        seen = await failure(served.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="x")))
    elif when == "late":
        served.engine.pause_after, served.engine.late_error = 1, error
        seen = await failure(served.inference.GenerateStream(pb.GenerateRequest(prompt="hi")))
    else:
        served.engine.error = error
        method = served.inference.Generate if when == "unary" else served.inference.GenerateStream
        seen = await failure(method(pb.GenerateRequest(prompt="hi")))
    assert seen.code() is CODES[kind]
    assert details_of(seen)["ErrorInfo"].reason == kind.reason
    assert trailer(seen.trailing_metadata(), "x-request-id")
    assert not served.engine.running


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_a_fault_says_nothing_but_an_id_that_the_log_holds(
    served: Served, log: io.StringIO, method: str
) -> None:
    served.engine.error = ValueError("a secret thought")
    error = await failure(getattr(served.inference, method)(pb.GenerateRequest(prompt="a private prompt")))
    assert error.code() is grpc.StatusCode.INTERNAL
    request_id = details_of(error)["ErrorInfo"].metadata["request_id"]
    assert request_id == trailer(error.trailing_metadata(), "x-request-id")
    assert request_id in error.details()
    assert "secret" not in repr(error)
    written = log.getvalue()
    assert f"[{request_id}]" in written
    assert "ValueError: a secret thought" in written
    assert "Traceback" in written
    assert "a private prompt" not in written


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_a_cancelled_task_inside_the_server_is_a_fault_and_not_silence(
    served: Served, method: str
) -> None:
    served.engine.error = asyncio.CancelledError()
    error = await failure(getattr(served.inference, method)(pb.GenerateRequest(prompt="hi")))
    assert error.code() is grpc.StatusCode.INTERNAL


async def test_an_engine_that_ends_without_a_word_is_a_fault(served: Served) -> None:
    served.engine.answer = ()
    error = await failure(served.inference.Generate(pb.GenerateRequest(prompt="hi")))
    assert error.code() is grpc.StatusCode.INTERNAL


async def test_an_error_leaves_other_calls_alone(served: Served) -> None:
    served.engine.pause_after = 1
    running = asyncio.ensure_future(served.inference.Generate(pb.GenerateRequest(prompt="hi")))
    await served.engine.paused.wait()
    await failure(served.inference.Generate(pb.GenerateRequest()))
    await failure(served.inference.Generate(pb.GenerateRequest(prompt="hi", adapter="../x")))
    served.engine.resume.set()
    assert (await running).text == "Hello world"


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a\x02\xff\xfe",  # prompt: not UTF-8
        b"\x22\x03a\xc3\x28",  # adapter: a broken sequence
        b"\x0a\x05ab",  # shorter than it says
        b"\xff\xff\xff",
        b"\x0b",  # a group that never ends
    ],
)
@pytest.mark.parametrize("method", [GENERATE, STREAM])
async def test_bytes_that_are_no_message(served: Served, log: io.StringIO, data: bytes, method: str) -> None:
    raw: Any = served.channel.unary_stream if method == STREAM else served.channel.unary_unary
    error = await failure(raw(method)(data))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details_of(error)["BadRequest"].field_violations[0].field == "request"
    assert "Traceback" not in log.getvalue()
    assert not served.engine.requests


async def test_huge_fields(served: Served) -> None:
    for request, field in (
        (pb.GenerateRequest(prompt="hi", adapter="x" * 10**6), "adapter"),
        (
            pb.GenerateRequest(prompt="hi", stopping={"stop_sequences": ["x" * 10**6]}),
            "stopping.stop_sequences[0]",
        ),
        (
            pb.GenerateRequest(prompt="hi", stopping={"stop_token_ids": [1] * 10**5}),
            "stopping.stop_token_ids",
        ),
    ):
        error = await failure(served.inference.Generate(request))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details_of(error)["BadRequest"].field_violations[0].field == field
        assert len(error.details()) < 600


async def test_hundreds_of_problems_arrive(served: Served) -> None:
    served.engine.adapter_error = errors.AdapterInvalid(
        "x", [f"tensor {n} é has a bad shape" for n in range(999)]
    )
    error = await failure(served.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="x")))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    violations = details_of(error)["BadRequest"].field_violations
    assert len(violations) == 21
    assert violations[-1].description == "and 979 more problems"


async def test_an_unknown_method(served: Served) -> None:
    error = await failure(served.channel.unary_unary("/polygraft.v1.InferenceService/Nope")(b""))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_sane_request_id_is_kept(served: Served, log: io.StringIO) -> None:
    call = served.inference.Generate(pb.GenerateRequest(prompt="hi"), metadata=(("x-request-id", "abc-1"),))
    answer = await call
    assert trailer(await call.trailing_metadata(), "x-request-id") == "abc-1"
    assert answer.summary.request_id == "abc-1"
    assert "polygraft.access [abc-1] Generate OK" in log.getvalue()


@pytest.mark.parametrize("wanted", ["", "x" * 101, "a b", "-a", 'a"b', "a[31m"])
async def test_an_odd_request_id_is_replaced(served: Served, wanted: str) -> None:
    call = served.inference.GetModel(pb.GetModelRequest(), metadata=(("x-request-id", wanted),))
    await call
    given = trailer(await call.trailing_metadata(), "x-request-id")
    assert given
    assert given != wanted


async def test_the_same_request_id_twice_at_once(served: Served) -> None:
    served.engine.pause_after = 1
    metadata = (("x-request-id", "twin"),)
    calls = [
        asyncio.ensure_future(served.inference.Generate(pb.GenerateRequest(prompt="hi"), metadata=metadata))
        for _ in range(2)
    ]
    await served.engine.until_running(2)
    served.engine.resume.set()
    ids = {(await call).summary.request_id for call in calls}
    assert len(ids) == 2
    assert "twin" in ids


async def test_the_log_tells_calls_and_never_contents(served: Served, log: io.StringIO) -> None:
    await served.inference.Generate(
        pb.GenerateRequest(prompt="a private prompt"), metadata=(("authorization", "Bearer hush-hush"),)
    )
    await failure(served.inference.Generate(pb.GenerateRequest(prompt="a private prompt", adapter="a/b")))
    await served.server.calls.wait_idle(5)
    written = log.getvalue()
    assert "Generate OK" in written
    assert "Generate INVALID_ARGUMENT reason=INVALID_ARGUMENT" in written
    for private in ("private", "Hel", "world", "hush"):
        assert private not in written


async def test_calls_and_errors_are_counted(served: Served) -> None:
    await served.inference.GetModel(pb.GetModelRequest())
    await failure(served.inference.Generate(pb.GenerateRequest()))
    value = served.metrics.registry.get_sample_value
    assert value("polygraft_rpcs_total", {"method": GENERATE}) == 1
    assert value("polygraft_errors_total", {"method": GENERATE, "code": "INVALID_ARGUMENT"}) == 1
    assert value("polygraft_rpcs_total", {"method": "/polygraft.v1.InferenceService/GetModel"}) == 1


async def test_the_clients_errors_have_the_logs_id(served: Served, log: io.StringIO) -> None:
    async with AsyncClient(f"127.0.0.1:{served.port}") as client:
        with pytest.raises(NotFound) as caught:
            await client.adapters.get("nobody")
    assert caught.value.request_id
    assert f"[{caught.value.request_id}] GetAdapter NOT_FOUND reason=ADAPTER_NOT_FOUND" in log.getvalue()


async def test_too_large_messages_name_the_setting(serve_with: Serve) -> None:
    async with (
        serve_with(max_message_bytes=1000) as served,
        AsyncClient(f"127.0.0.1:{served.port}") as client,
    ):
        with pytest.raises(ResourceExhausted, match="the server's --max-message-bytes allows"):
            await client.generate("x" * 2000)
        served.engine.answer = ["y" * 2000]
        with pytest.raises(ResourceExhausted, match="the server's --max-message-bytes allows"):
            await client.generate("x")
