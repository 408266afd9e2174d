"""A real server on a port of its own, over a fake engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from polygraft.config import ServerConfig
from polygraft.rpc.grpc_server import GrpcServer
from polygraft.telemetry.metrics import Metrics
from polygraft_api.v1 import adapters_pb2_grpc, inference_pb2_grpc
from tests.rpc.fake_engine import FakeEngine


@dataclass
class Served:
    engine: FakeEngine
    server: GrpcServer
    metrics: Metrics
    channel: grpc.aio.Channel
    port: int

    def __post_init__(self) -> None:
        self.inference: Any = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.adapters: Any = adapters_pb2_grpc.AdapterServiceStub(self.channel)


Serve = Callable[..., AbstractAsyncContextManager[Served]]


@asynccontextmanager
async def _serve(engine: FakeEngine | None = None, **settings: Any) -> AsyncIterator[Served]:
    engine = engine or FakeEngine()
    metrics = Metrics()
    config = ServerConfig(listen="127.0.0.1:0", metrics="", **settings)
    server = GrpcServer(config, engine, metrics)
    port = await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Served(engine, server, metrics, channel, port)
    finally:
        await server.stop(None)


@pytest.fixture
def serve_with() -> Serve:
    return _serve


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with _serve() as served:
        yield served


def details_of(error: grpc.RpcError) -> dict[str, Any]:
    """The google.rpc details of an error by their type's name."""
    status = rpc_status.from_call(error)  # also checks that status and trailers agree
    found = {}
    for packed in status.details if status else ():
        name = packed.type_url.rpartition(".")[2]
        found[name] = getattr(error_details_pb2, name)()
        assert packed.Unpack(found[name])
    return found


def trailer(metadata: Any, key: str) -> str | bytes | None:
    return dict(tuple(pair) for pair in metadata or ()).get(key)
