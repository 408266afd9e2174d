"""A server whose engine is on a thread or in a process of its own, for benchmarks/boundary.py."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import sys
from collections.abc import AsyncGenerator
from multiprocessing.connection import Connection

from polygraft.config import ServerConfig
from polygraft.core.output import RequestOutput
from polygraft.engine.async_engine import AsyncEngine
from polygraft.engine.client import ModelInfo
from polygraft.engine.engine_thread import EngineThread
from polygraft.engine.load_engine import load_engine
from polygraft.rpc.grpc_server import GrpcServer
from polygraft.server import SWITCH_SECONDS
from polygraft.telemetry.metrics import Metrics
from polygraft_types.requests import Request

CONFIG = ServerConfig(listen="127.0.0.1:0", metrics="", kv_cache_bytes=256 * 2**20, threads=2)


def run_engine(pipe: Connection) -> None:
    """The child: step while there is work, one message in and one out a step."""
    engine = load_engine(CONFIG)
    pipe.send(engine.model)
    while True:
        while pipe.poll() or not engine.has_work:
            request = pipe.recv()
            if request is None:
                return
            engine.submit(request)
        pipe.send(engine.step().outputs)


class ProcessEngine:
    """Just enough of `EngineClient` for this benchmark, over a pipe to a child process."""

    def __init__(self) -> None:
        self._pipe, child = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=run_engine, args=(child,))
        self._process.start()
        self.model: ModelInfo = self._pipe.recv()
        self.failure: Exception | None = None
        self._queues: dict[str, asyncio.Queue[RequestOutput]] = {}

    def start(self) -> None:
        asyncio.get_running_loop().add_reader(self._pipe.fileno(), self._deliver)

    def _deliver(self) -> None:
        for output in self._pipe.recv():
            self._queues[output.request_id].put_nowait(output)

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        queue = self._queues[request.id] = asyncio.Queue()
        self._pipe.send(request)
        while True:
            output = await queue.get()
            yield output
            if output.terminal:
                del self._queues[request.id]
                return

    def stop(self) -> None:
        # The child closes its end, which a reader would take for something to read.
        asyncio.get_running_loop().remove_reader(self._pipe.fileno())
        self._pipe.send(None)
        self._process.join()


async def main(kind: str) -> None:
    sys.setswitchinterval(SWITCH_SECONDS)
    metrics = Metrics()
    handle: AsyncEngine | ProcessEngine
    if kind == "thread":
        thread = EngineThread()
        engine = thread.submit(lambda: load_engine(CONFIG)).result()
        handle = AsyncEngine(engine, metrics, max_waiting=1024, thread=thread)
    else:
        handle = ProcessEngine()
    handle.start()
    server = GrpcServer(CONFIG, handle, metrics)
    port = await server.start()
    print(f"ready 127.0.0.1:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(1.0)
    if isinstance(handle, AsyncEngine):
        await handle.drain(1.0)
    else:
        handle.stop()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(sys.argv[1]))
