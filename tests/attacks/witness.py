"""An honest client that watches what an attack does to everybody else."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from polygraft_api.v1 import inference_pb2 as pb
from tests.attacks.target import Target, chat, inference

INTERVAL = 0.05
STREAM_TOKENS = 2000


@dataclass(slots=True)
class Seen:
    """What everybody else felt; seconds and bytes.

    Args:
        health: the longest that a health check took.
        gap: the longest between two tokens of a running stream.
        errors: of either, in words.
        memory: most that the server held, its children included.
    """

    health: float = 0.0
    gap: float = 0.0
    errors: str = ""
    memory: int = 0


class Witness:
    """Runs a stream and checks health while its context lasts.

    Args:
        pid: the server's.
    """

    def __init__(self, target: Target, pid: int) -> None:
        self.seen = Seen()
        self._target = target
        self._server = psutil.Process(pid)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Seen:
        self._channel = self._target.channel()
        started = asyncio.Event()
        self._tasks = [
            asyncio.create_task(self._stream(started)),
            asyncio.create_task(self._check_health()),
            asyncio.create_task(self._watch_memory()),
        ]
        await asyncio.wait_for(started.wait(), 60)
        return self.seen

    async def __aexit__(self, *exception: object) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._channel.close()

    async def _stream(self, started: asyncio.Event) -> None:
        request = pb.GenerateRequest(
            prompt="A very long story:",
            stopping=pb.StoppingOptions(max_new_tokens=STREAM_TOKENS, ignore_eos=True),
        )
        try:
            while True:
                last = time.monotonic()
                async for _ in inference(self._channel).GenerateStream(request):
                    now = time.monotonic()
                    if started.is_set():
                        self.seen.gap = max(self.seen.gap, now - last)
                    last = now
                    started.set()
        except grpc.aio.AioRpcError as error:
            self.seen.errors += f"stream: {error.code().name} {error.details()}; "

    async def _check_health(self) -> None:
        stub = health_pb2_grpc.HealthStub(self._channel)
        while True:
            asked = time.monotonic()
            try:
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
                if answer.status != health_pb2.HealthCheckResponse.SERVING:
                    self.seen.errors += "health: not serving; "
            except grpc.aio.AioRpcError as error:
                self.seen.errors += f"health: {error.code().name}; "
            self.seen.health = max(self.seen.health, time.monotonic() - asked)
            await asyncio.sleep(INTERVAL)

    async def _watch_memory(self) -> None:
        while True:
            self.seen.memory = max(self.seen.memory, self.memory())
            await asyncio.sleep(0.2)

    def memory(self) -> int:
        """What the server and its children hold now."""
        total = 0
        for process in (self._server, *self._server.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total


async def answer(target: Target) -> str:
    """What the server says to a fixed question."""
    async with target.channel() as channel:
        request = pb.GenerateRequest(
            chat=chat("What is the capital of France?"), stopping=pb.StoppingOptions(max_new_tokens=16)
        )
        return (await inference(channel).Generate(request, timeout=60)).text
