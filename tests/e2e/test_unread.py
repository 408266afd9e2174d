"""Callers that don't read their streams: what they hold is bounded, and the others notice nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from polygraft.config import ServerConfig
from polygraft.engine.async_engine import AsyncEngine
from polygraft.rpc import interceptors
from polygraft.rpc.grpc_server import GrpcServer
from polygraft.telemetry.metrics import Metrics
from polygraft_api.v1 import inference_pb2 as pb
from polygraft_api.v1 import inference_pb2_grpc
from tests.engines import make_engine
from tests.tiny import save_tiny_model

# A connection that takes little before somebody reads.
NARROW = [
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1024),
    ("grpc.use_local_subchannel_pool", 1),
]
TOKENS = 400


def chatty(tokens: int = TOKENS) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt="go",
        stopping={"max_new_tokens": tokens, "ignore_eos": True},
        response={"top_logprobs": 20, "token_ids": True},
    )


class Served:
    def __init__(self, handle: AsyncEngine, server: GrpcServer, metrics: Metrics, address: str) -> None:
        self.handle = handle
        self.server = server
        self.metrics = metrics
        self.address = address

    def ended(self, limit: str) -> float | None:
        name = "polygraft_unread_streams_total"
        return self.metrics.registry.get_sample_value(name, {"limit": limit})

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unread")
    return save_tiny_model(folder, "llama", max_position_embeddings=1024, num_hidden_layers=1)


@asynccontextmanager
async def serving(model: Path, **settings: Any) -> AsyncIterator[Served]:
    engine = make_engine(model, **settings)
    metrics = Metrics()
    handle = AsyncEngine(engine, metrics, max_waiting=64)
    handle.start()
    server = GrpcServer(ServerConfig(listen="127.0.0.1:0", metrics="", **settings), handle, metrics)
    port = await server.start()
    yield Served(handle, server, metrics, f"127.0.0.1:{port}")
    await server.stop(None)
    assert await handle.drain(5.0) == 0
    engine.check_integrity()


async def read_all(address: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        ids = [token async for chunk in stub.GenerateStream(chatty()) for token in chunk.token_ids]
        return len(ids)


async def test_a_reader_that_comes_late_misses_nothing(model: Path) -> None:
    async with (
        serving(model) as served,
        grpc.aio.insecure_channel(served.address, options=NARROW) as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        expected = await stub.Generate(chatty())
        stream = stub.GenerateStream(chatty())
        await served.until(lambda: served.handle._streams._unread > 0)
        await served.until(lambda: not served.handle._streams)
        chunks = [chunk async for chunk in stream]
        assert sum(len(chunk.token_ids) for chunk in chunks) == TOKENS
        assert len(chunks) < TOKENS, "what lay unread comes together"
        assert "".join(chunk.text for chunk in chunks) == expected.text
        assert list(chunks[-1].final.token_ids) == list(expected.token_ids)
        assert [entry for chunk in chunks for entry in chunk.logprobs] == list(expected.logprobs)
        assert served.handle._streams._unread == 0
        assert (served.ended("bytes"), served.ended("time")) == (0, 0)


async def test_more_than_may_lie_unread(model: Path) -> None:
    async with (
        serving(model, max_unread_bytes=200_000) as served,
        grpc.aio.insecure_channel(served.address, options=NARROW) as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        streams = [stub.GenerateStream(chatty()) for _ in range(3)]
        await served.until(lambda: served.ended("bytes") == 3)
        await served.until(lambda: not served.handle._streams)
        assert served.handle._streams._unread == 0
        assert served.handle._engine.scheduler.pool.used == 0
        for stream in streams:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in stream:
                    pass
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await read_all(served.address) == TOKENS
        cancelled = served.metrics.registry.get_sample_value(
            "polygraft_requests_total",
            {"adapter": "", "kind": "base", "path": "UNMERGED", "finish_reason": "CANCELLED"},
        )
        assert cancelled == 3


async def test_output_that_lies_for_too_long(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptors, "_STATUS_SECONDS", 0.2)
    async with (
        serving(model, unread_timeout=0.5) as served,
        grpc.aio.insecure_channel(served.address, options=NARROW) as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        streams = [stub.GenerateStream(chatty()) for _ in range(3)]
        await served.until(lambda: served.ended("time") == 3)
        assert await served.server.calls.wait_idle(30)
        assert served.handle._streams._unread == 0
        assert not served.handle._streams
        assert await read_all(served.address) == TOKENS
        for stream in streams:
            stream.cancel()


async def test_many_streams_together_may_hold_so_much(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polygraft.engine.streams.TOGETHER", 2)
    async with (
        serving(model, max_unread_bytes=500_000) as served,
        grpc.aio.insecure_channel(served.address, options=NARROW) as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        streams = [stub.GenerateStream(chatty(180)) for _ in range(6)]
        await served.until(lambda: (served.ended("bytes") or 0) > 0)
        await served.until(lambda: not served.handle._streams)
        assert 0 < served.handle._streams._unread <= 1_000_000
        for stream in streams:
            stream.cancel()
        await served.until(lambda: served.handle._streams._unread == 0)


async def test_an_output_larger_than_may_lie_unread_is_read_all_the_same(model: Path) -> None:
    async with (
        serving(model, max_unread_bytes=1000) as served,
        grpc.aio.insecure_channel(served.address) as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[65] * 300),
            stopping={"max_new_tokens": 1, "ignore_eos": True},
            response={"echo": True, "top_logprobs": 20},
        )
        assert len((await stub.Generate(request)).logprobs) == 301
        score = pb.ScoreRequest(
            prompt="a", continuation_token_ids=[pb.TokenIds(ids=[66] * 300)], top_logprobs=20
        )
        assert len((await stub.Score(score)).scores[0].tokens) == 300
