"""From start to exit: health, draining, signals, a dead engine."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from polygraft.config import ServerConfig
from polygraft.errors import ConfigError
from polygraft.rpc.grpc_server import ADAPTERS, INFERENCE
from polygraft.rpc.lifecycle import Shutdown, serve
from polygraft.telemetry.metrics import Metrics
from polygraft.telemetry.probes import Probes
from polygraft_api.v1 import inference_pb2 as pb
from polygraft_api.v1 import inference_pb2_grpc
from tests.rpc.conftest import Served, details_of
from tests.rpc.fake_engine import FakeEngine

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
ASK = pb.GenerateRequest(prompt="hi")


@dataclass
class Process:
    """What `serve` runs, as a task of the test."""

    engine: FakeEngine
    shutdown: Shutdown
    port: int
    probes: Probes
    exit_status: asyncio.Task[int]
    channel: grpc.aio.Channel

    def __post_init__(self) -> None:
        self.inference: Any = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)

    async def status(self, service: str = "") -> int:
        return (await self.health.Check(health_pb2.HealthCheckRequest(service=service))).status

    async def until_not_serving(self) -> None:
        watch = self.health.Watch(health_pb2.HealthCheckRequest())
        while (await watch.read()).status != NOT_SERVING:
            pass
        watch.cancel()


@asynccontextmanager
async def running(engine: FakeEngine, **settings: Any) -> AsyncIterator[Process]:
    shutdown, ready, probes = Shutdown(), asyncio.get_running_loop().create_future(), Probes()
    config = ServerConfig(listen="127.0.0.1:0", metrics="", **settings)
    task = asyncio.create_task(
        serve(config, engine, Metrics(), probes=probes, on_ready=ready.set_result, shutdown=shutdown)
    )
    await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await ready}") as channel:
        yield Process(engine, shutdown, await ready, probes, task, channel)
        shutdown.request()
        shutdown.request()
        await task


def paused() -> FakeEngine:
    engine = FakeEngine()
    engine.pause_after = 1
    return engine


@pytest.mark.parametrize("service", ["", INFERENCE, ADAPTERS])
async def test_health_of_each_service(service: str) -> None:
    async with running(FakeEngine()) as process:
        assert await process.status(service) == SERVING


async def test_health_of_an_unknown_service() -> None:
    async with running(FakeEngine()) as process:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await process.status("polygraft.v1.Nope")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_draining_finishes_what_runs_and_refuses_the_rest() -> None:
    async with running(paused()) as process:
        watch = process.health.Watch(health_pb2.HealthCheckRequest(service=INFERENCE))
        assert (await watch.read()).status == SERVING
        stream = process.inference.GenerateStream(ASK)
        await stream.read()
        unary = asyncio.ensure_future(process.inference.Generate(ASK))
        await process.engine.until_running(2)

        process.shutdown.request()
        assert (await watch.read()).status == NOT_SERVING
        for service in ("", INFERENCE, ADAPTERS):
            assert await process.status(service) == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await process.inference.Generate(ASK)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert details_of(caught.value)["ErrorInfo"].reason == "DRAINING"
        assert not process.exit_status.done()

        process.engine.resume.set()
        assert (await unary).text == "Hello world"
        assert (await stream.read()).text == "lo "
        assert (await stream.read()).final.text == "Hello world"
        assert await process.exit_status == 0
        assert process.engine.aborted == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_a_signal_drains(number: signal.Signals) -> None:
    async with running(paused(), drain_timeout=17.0) as process:
        call = asyncio.ensure_future(process.inference.Generate(ASK))
        await process.engine.paused.wait()
        os.kill(os.getpid(), number)
        await process.until_not_serving()
        process.engine.resume.set()
        assert (await call).text == "Hello world"
        assert await process.exit_status == 0
        assert process.engine.drained_with == [17.0]


async def test_what_outlasts_the_drain_is_aborted() -> None:
    async with running(paused(), drain_timeout=0.05) as process:
        call = process.inference.Generate(ASK)
        await process.engine.paused.wait()
        process.shutdown.request()
        with pytest.raises(grpc.aio.AioRpcError):
            await call
        assert await process.exit_status == 0
        assert not process.engine.running


async def test_a_second_signal_aborts_at_once() -> None:
    async with running(paused(), drain_timeout=3600.0) as process:
        call = process.inference.Generate(ASK)
        await process.engine.paused.wait()
        process.shutdown.request()
        await process.until_not_serving()
        process.shutdown.request()
        assert await process.exit_status == 1
        with pytest.raises(grpc.aio.AioRpcError):
            await call
        assert process.engine.dropped.is_set()
        assert process.engine.drained_with == [3600.0, 0.0]


async def test_a_dead_engine_ends_streams_and_the_process() -> None:
    async with running(paused(), drain_timeout=3600.0) as process:
        watch = process.health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        stream = process.inference.GenerateStream(ASK)
        await stream.read()
        process.engine.die(RuntimeError("out of luck"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert details_of(caught.value)["ErrorInfo"].reason == "ENGINE_DEAD"
        assert "luck" not in caught.value.details()
        assert (await watch.read()).status == NOT_SERVING
        assert await process.exit_status == 1


async def test_an_engine_that_dies_while_draining() -> None:
    async with running(paused(), drain_timeout=3600.0) as process:
        call = process.inference.Generate(ASK)
        await process.engine.paused.wait()
        process.shutdown.request()
        await process.until_not_serving()
        process.engine.die(RuntimeError("out of luck"))
        with pytest.raises(grpc.aio.AioRpcError):
            await call
        assert await process.exit_status == 1


async def test_a_taken_port_names_its_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError) as caught:
            await serve(ServerConfig(listen=address, metrics=""), FakeEngine(), Metrics())
    assert caught.value.flag == "--listen"
    assert address in str(caught.value)


async def test_probes_follow_the_server_from_its_start_to_its_end() -> None:
    async with running(paused()) as process:
        probes = process.probes
        assert (probes.unhealthy_because(), probes.unready_because()) == (None, None)
        stream = process.inference.GenerateStream(ASK)
        await stream.read()
        process.shutdown.request()
        await process.until_not_serving()
        assert probes.unhealthy_because() is None
        assert probes.unready_because() == "draining: the server is shutting down"


async def test_probes_tell_that_the_engine_is_dead() -> None:
    async with running(FakeEngine()) as process:
        process.engine.die(RuntimeError("out of luck"))
        assert await process.exit_status == 1
        assert process.probes.unhealthy_because() == "the engine failed; the log has the cause"


async def test_two_servers_never_share_a_port(served: Served) -> None:
    config = ServerConfig(listen=f"127.0.0.1:{served.port}", metrics="")
    with pytest.raises(ConfigError, match="--listen"):
        await serve(config, FakeEngine())


def test_the_rpc_layer_imports_no_torch() -> None:
    code = "import sys, polygraft.rpc.lifecycle; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
