"""The access log: exactly one line for each call, however it ends."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from polygraft.errors import PolygraftError, ResourceExhausted
from polygraft.telemetry.logging import configure_logging
from polygraft_api.v1 import adapters_pb2
from polygraft_api.v1 import inference_pb2 as pb

from .conftest import Serve, Served
from .fake_engine import FakeEngine


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    yield stream
    root.handlers[:] = before
    root.setLevel(level)
    logging.getLogger("polygraft").setLevel(logging.NOTSET)


async def lines(served: Served, log: io.StringIO) -> list[dict[str, Any]]:
    await served.server.calls.wait_idle(5)
    records = [json.loads(line) for line in log.getvalue().splitlines()]
    return [record for record in records if record["logger"] == "polygraft.access"]


async def test_a_finished_request(served: Served, log: io.StringIO) -> None:
    await served.inference.Generate(
        pb.GenerateRequest(prompt="a private prompt", adapter="json"), metadata=(("x-request-id", "mine"),)
    )
    (line,) = await lines(served, log)
    assert list(line) == [
        "time", "level", "logger", "message", "request_id", "method", "code", "adapter", "path", "finish",
        "prompt_tokens", "cached_tokens", "output_tokens", "queue_s", "first_token_s", "total_s", "peer",
    ]  # fmt: skip
    assert (line["request_id"], line["method"], line["code"]) == ("mine", "Generate", "OK")
    assert (line["adapter"], line["path"], line["finish"]) == ("json", "unmerged", "stop_sequence")
    assert line["message"].startswith(
        "Generate OK adapter=json path=unmerged finish=stop_sequence prompt_tokens=3 "
    )
    assert line["peer"].startswith("ipv4:127.0.0.1:")
    assert "private" not in log.getvalue()


async def test_others_of_the_contract(served: Served, log: io.StringIO) -> None:
    stream = served.inference.GenerateStream(
        pb.GenerateRequest(prompt="x", adapters=[{"name": "json"}, {"name": "shout"}])
    )
    async for _ in stream:
        pass
    await served.inference.Score(pb.ScoreRequest(prompt="a", continuations=["b"]))
    await served.inference.GetModel(pb.GetModelRequest(adapter="json"))
    await served.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name="shout"))
    told = [(line["method"], line.get("adapter"), line.get("finish")) for line in await lines(served, log)]
    assert told == [
        ("GenerateStream", "json+shout", "stop_sequence"),
        ("Score", None, "scored"),
        ("GetModel", "json", None),
        ("GetAdapter", "shout", None),
    ]


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (ResourceExhausted("the queue is full"), "RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED"),
        (RuntimeError("a bug"), "INTERNAL", "INTERNAL"),
    ],
)
async def test_a_failed_request(
    serve_with: Serve, log: io.StringIO, error: Exception, code: str, reason: str
) -> None:
    engine = FakeEngine()
    engine.error = error
    async with serve_with(engine) as served:
        with pytest.raises(grpc.aio.AioRpcError):
            await served.inference.Generate(pb.GenerateRequest(prompt="x", adapter="json"))
        (line,) = await lines(served, log)
    assert (line["code"], line["reason"], line["adapter"]) == (code, reason, "json")
    assert isinstance(error, PolygraftError) or "Traceback" in log.getvalue()


@pytest.mark.parametrize("how", ["cancelled", "expired"])
async def test_a_request_that_its_caller_gives_up(serve_with: Serve, log: io.StringIO, how: str) -> None:
    engine = FakeEngine()
    engine.pause_after = 1
    async with serve_with(engine) as served:
        timeout = 0.5 if how == "expired" else None
        call = served.inference.GenerateStream(pb.GenerateRequest(prompt="x"), timeout=timeout)
        await call.read()
        if how == "cancelled":
            call.cancel()
        with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError)):
            await call.read()
            await call.read()
        (line,) = await lines(served, log)
    assert line["code"] == ("DEADLINE_EXCEEDED" if how == "expired" else "CANCELLED")
    assert line["output_tokens"] == 1


async def test_it_can_be_turned_off(serve_with: Serve, log: io.StringIO) -> None:
    async with serve_with(log_requests=False) as served:
        await served.inference.Generate(pb.GenerateRequest(prompt="x"))
        assert await lines(served, log) == []
