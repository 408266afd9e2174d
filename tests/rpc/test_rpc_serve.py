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
from polygraft.rpc.serve import Ports, Shutdown, serve
from polygraft.rpc.server import ADAPTERS, INFERENCE
from polygraft.telemetry.metrics import Metrics
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
    ports: Ports
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
    shutdown, ready = Shutdown(), asyncio.get_running_loop().create_future()
    config = ServerConfig(listen="127.0.0.1:0", metrics="127.0.0.1:0", **settings)
    task = asyncio.create_task(serve(config, engine, Metrics(), on_ready=ready.set_result, shutdown=shutdown))
    await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    async with grpc.aio.insecure_channel(f"127.0.0.1:{(await ready).grpc}") as channel:
        yield Process(engine, shutdown, await ready, task, channel)
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


async def test_metrics_are_served_and_the_port_is_freed() -> None:
    async with running(FakeEngine()) as process:
        await process.inference.Generate(ASK)
        reader, writer = await asyncio.open_connection("127.0.0.1", process.ports.metrics)
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        page = (await reader.read()).decode()
        writer.close()
        assert 'polygraft_model_info{architecture="llama"' in page
        assert 'polygraft_rpcs_total{method="/polygraft.v1.InferenceService/Generate"} 1.0' in page
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", process.ports.metrics)


@pytest.mark.parametrize("setting", ["listen", "metrics"])
async def test_a_taken_port_names_its_flag(setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        config = ServerConfig(**{"listen": "127.0.0.1:0", "metrics": "127.0.0.1:0", setting: address})
        with pytest.raises(ConfigError) as caught:
            await serve(config, FakeEngine(), Metrics())
    assert caught.value.flag == f"--{setting}"
    assert address in str(caught.value)


async def test_metrics_may_be_off() -> None:
    ready, shutdown = asyncio.get_running_loop().create_future(), Shutdown()
    config = ServerConfig(listen="127.0.0.1:0", metrics="")
    task = asyncio.create_task(
        serve(config, FakeEngine(), Metrics(), on_ready=ready.set_result, shutdown=shutdown)
    )
    assert (await ready).metrics is None
    shutdown.request()
    assert await task == 0


async def test_two_servers_never_share_a_port(served: Served) -> None:
    config = ServerConfig(listen=f"127.0.0.1:{served.port}", metrics="")
    with pytest.raises(ConfigError, match="--listen"):
        await serve(config, FakeEngine())


def test_the_rpc_layer_imports_no_torch() -> None:
    code = "import sys, polygraft.rpc.serve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
