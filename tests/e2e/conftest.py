"""A real server over a real engine: a tiny model in this process, or the default model in one of its own."""

from __future__ import annotations

import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from polygraft.cli.demo.launcher import Addresses, ServerProcess, serve_command
from polygraft.config import ServerConfig
from polygraft.engine.async_engine import AsyncEngine
from polygraft.rpc.grpc_server import GrpcServer
from polygraft.telemetry.metrics import Metrics
from polygraft_api.v1 import adapters_pb2_grpc, inference_pb2_grpc
from polygraft_api.v1 import inference_pb2 as pb
from tests.engines import make_engine

SAMPLES = Path(__file__).resolve().parents[2] / "adapters"


@dataclass
class Live:
    """A served tiny model. `store` may be written to."""

    handle: AsyncEngine
    metrics: Metrics
    store: Path
    address: str
    inference: Any
    adapters: Any

    async def neighbour(self, adapter: str = "") -> list[int]:
        """A long request's tokens."""
        request = pb.GenerateRequest(
            prompt="a long request that must not be disturbed",
            adapter=adapter,
            stopping=pb.StoppingOptions(max_new_tokens=60, ignore_eos=True),
            response=pb.ResponseOptions(token_ids=True),
        )
        tokens: list[int] = []
        async for chunk in self.inference.GenerateStream(request):
            tokens += chunk.token_ids
        assert len(tokens) == 60
        return tokens


@pytest.fixture
async def live(llama: Path, llama_store: Path, tmp_path: Path) -> AsyncIterator[Live]:
    store = tmp_path / "store"
    shutil.copytree(llama_store, store)
    engine = make_engine(llama, store, max_waiting=64)
    metrics = Metrics()
    handle = AsyncEngine(engine, metrics, max_waiting=64)
    handle.start()
    server = GrpcServer(ServerConfig(listen="127.0.0.1:0", metrics=""), handle, metrics)
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Live(
            handle,
            metrics,
            store,
            f"127.0.0.1:{port}",
            inference_pb2_grpc.InferenceServiceStub(channel),
            adapters_pb2_grpc.AdapterServiceStub(channel),
        )
    await server.stop(None)
    aborted = await handle.drain(5.0)
    assert aborted == 0
    assert not engine.scheduler.has_work
    engine.check_integrity()


@pytest.fixture(scope="session")
def real_server() -> Iterator[Addresses]:
    """The default model in float32 with the sample adapters, as `make serve` runs them."""
    command = serve_command(
        "--adapters", str(SAMPLES), "--dtype", "float32", "--kv-cache-bytes", "64MiB"
    )  # fmt: skip
    assert command[0] == sys.executable
    with ServerProcess(command) as server:
        yield server.wait_ready(300, report=lambda line: None)
        server.stop()
