"""More calls, and larger messages, than the server has a use for."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from polygraft.rpc.limits import MessageLimits
from polygraft.rpc.plain_services import bounded
from polygraft_api.v1 import adapters_pb2 as ap
from polygraft_api.v1 import inference_pb2 as pb
from polygraft_api.v1 import inference_pb2_grpc
from tests.rpc.conftest import Serve, Served, details_of
from tests.rpc.fake_engine import MODEL, FakeEngine

ASK = pb.GenerateRequest(prompt="hi")


async def test_calls_of_all_connections_together_are_bounded(serve_with: Serve) -> None:
    engine = FakeEngine()
    engine.pause_after = 1
    async with serve_with(engine, max_num_seqs=1, max_waiting=1) as served:
        most = 1 + 1 + 64
        calls = [asyncio.ensure_future(served.inference.Generate(ASK)) for _ in range(most)]
        await engine.until_running(most)
        other = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}", options=other) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await inference_pb2_grpc.InferenceServiceStub(channel).Generate(ASK)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "RetryInfo" in details_of(caught.value)
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        engine.resume.set()
        assert {answer.text for answer in await asyncio.gather(*calls)} == {"Hello world"}
        assert (await served.inference.Generate(ASK)).text == "Hello world"


@pytest.mark.parametrize("size", [10, 100_000])
async def test_a_message_is_the_same_whoever_parses_it(served: Served, size: int) -> None:
    answer = await served.inference.Tokenize(pb.TokenizeRequest(prompt="x" * size))
    assert list(answer.token_ids) == [ord("x")] * size


@pytest.mark.parametrize("size", [10, 100_000])
async def test_a_broken_message_is_the_same_whoever_parses_it(served: Served, size: int) -> None:
    broken = served.channel.unary_unary("/polygraft.v1.InferenceService/Tokenize")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await broken(b"\x0a" + b"\xff" * size)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_message_larger_than_its_method_needs_is_not_parsed(served: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.adapters.GetAdapter(ap.GetAdapterRequest(name="x" * 20_000))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "takes at most 16384" in (caught.value.details() or "")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.inference.Detokenize(pb.DetokenizeRequest(token_ids=[1] * 100_000))
    assert details_of(caught.value)["BadRequest"].field_violations[0].field == "request"
    stub = health_pb2_grpc.HealthStub(served.channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(service="x" * 20_000))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


class Deaf:
    """A watcher's context: its caller reads nothing."""

    def __init__(self) -> None:
        self.written: list[int] = []
        self.room = asyncio.Event()

    async def write(self, message: health_pb2.HealthCheckResponse) -> None:
        self.written.append(message.status)
        await self.room.wait()


async def test_a_watcher_that_doesnt_read_stops_nobodys_health() -> None:
    """Nor keeps a server from saying that it ends."""
    servicer = health.aio.HealthServicer()
    handler = grpc.unary_stream_rpc_method_handler(
        servicer.Watch,
        health_pb2.HealthCheckRequest.FromString,
        health_pb2.HealthCheckResponse.SerializeToString,
    )
    watch = bounded(handler, "/grpc.health.v1.Health/Watch", MessageLimits(MODEL)).unary_stream
    deaf, other = Deaf(), Deaf()
    other.room.set()
    tasks = [asyncio.ensure_future(watch(b"", context)) for context in (deaf, other)]
    while not (deaf.written and other.written):
        await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await servicer.set("", health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        await servicer.enter_graceful_shutdown()
        while other.written[-1] != health_pb2.HealthCheckResponse.NOT_SERVING:
            await asyncio.sleep(0)
    assert len(deaf.written) == 1
    deaf.room.set()
    while deaf.written[-1] != health_pb2.HealthCheckResponse.NOT_SERVING:
        await asyncio.sleep(0)
    assert len(deaf.written) == 2, "what it has missed is over"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
