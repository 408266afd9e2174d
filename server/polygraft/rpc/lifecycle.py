"""The life of a serving process: start, wait for a signal or a failure, drain, stop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from polygraft.config import ServerConfig
from polygraft.early_signals import CAUGHT, as_before
from polygraft.engine.client import EngineClient
from polygraft.errors import Draining, EngineDead
from polygraft.rpc.grpc_server import GrpcServer
from polygraft.rpc.interceptors import CallObserver
from polygraft.telemetry.probes import BEAT_SECONDS, Probes

# What the last messages get to leave the process once nothing is in flight any more.
_FLUSH_SECONDS = 0.5

_log = logging.getLogger("polygraft.serve")


@dataclass(frozen=True, slots=True)
class Shutdown:
    """How a serving process is told to end: the first request drains, the second aborts at once."""

    requested: asyncio.Event = field(default_factory=asyncio.Event)
    forced: asyncio.Event = field(default_factory=asyncio.Event)

    def request(self) -> None:
        """What a signal does."""
        (self.forced if self.requested.is_set() else self.requested).set()


async def serve(
    config: ServerConfig,
    handle: EngineClient,
    observer: CallObserver | None = None,
    *,
    probes: Probes | None = None,
    on_ready: Callable[[int], None] | None = None,
    shutdown: Shutdown | None = None,
) -> int:
    """Serve until SIGTERM, SIGINT, `shutdown` or the engine's death; returns the exit status.

    A drained server returns 0, also if requests had to be aborted after `drain_timeout`; a second
    signal or a dead engine return 1. The engine is stopped, except where it has died.

    Args:
        observer: is told about every call's end.
        probes: is told what the server's state is.
        on_ready: is called with the gRPC port once calls are answered.
        shutdown: ends the server as signals do.

    Raises:
        ConfigError: the address is taken.
    """
    shutdown, probes = shutdown or Shutdown(), probes or Probes()
    with _signals(shutdown):
        server = GrpcServer(config, handle, observer)
        port = await server.start()
        beating = asyncio.create_task(_beat(probes))
        try:
            probes.ready()
            if on_ready is not None:
                on_ready(port)
            return await _until_stopped(config.drain_timeout, server, handle, shutdown, probes)
        finally:
            beating.cancel()


async def _beat(probes: Probes) -> None:
    try:
        while True:
            probes.beat()
            await asyncio.sleep(BEAT_SECONDS)
    finally:
        probes.rest()


async def _until_stopped(
    drain_timeout: float, server: GrpcServer, handle: EngineClient, shutdown: Shutdown, probes: Probes
) -> int:
    failed = asyncio.create_task(handle.wait_failed())
    try:
        await _first(failed, shutdown.requested.wait())
        if failed.done():
            return await _fail(drain_timeout, server, handle.failure, probes)
        return await _drain(drain_timeout, server, handle, shutdown, failed, probes)
    finally:
        failed.cancel()
        await server.stop(None)


async def _drain(
    timeout: float,
    server: GrpcServer,
    handle: EngineClient,
    shutdown: Shutdown,
    failed: asyncio.Task[None],
    probes: Probes,
) -> int:
    _log.info("draining: calls in flight (%d) have up to %g s to finish", len(server.calls), timeout)
    probes.unready("draining: the server is shutting down")
    await server.refuse(Draining("the server is shutting down"))
    deadline = asyncio.get_running_loop().time() + timeout
    drained = asyncio.create_task(handle.drain(timeout))
    await _first(drained, failed, shutdown.forced.wait())
    if not drained.done() and not failed.done():
        drained.cancel()
        _log.warning("aborting %d calls", len(server.calls))
        await server.stop(None)
        await handle.drain(0.0)
        return 1
    if failed.done():
        drained.cancel()
        return await _fail(timeout, server, handle.failure, probes)
    if error := drained.exception():
        return await _fail(timeout, server, error, probes)
    if aborted := drained.result():
        _log.warning("aborted %d requests that were still running after %g s", aborted, timeout)
    # The engine is done; answers may still be on their way to slow readers.
    left = max(deadline - asyncio.get_running_loop().time(), _FLUSH_SECONDS)
    await _first(server.calls.wait_idle(left), shutdown.forced.wait())
    await server.stop(_FLUSH_SECONDS)
    _log.info("stopped")
    return 0


async def _fail(timeout: float, server: GrpcServer, cause: BaseException | None, probes: Probes) -> int:
    _log.critical("the engine failed", exc_info=cause)
    probes.dead("the engine failed; the log has the cause")
    await server.refuse(EngineDead("the engine failed"))
    await server.calls.wait_idle(timeout)
    await server.stop(_FLUSH_SECONDS)
    return 1


async def _first(*waits: asyncio.Task[Any] | Coroutine[Any, Any, Any]) -> None:
    """Return when the first of `waits` has ended; the coroutines among them are cancelled then."""
    own = [asyncio.create_task(wait) for wait in waits if not isinstance(wait, asyncio.Task)]
    given = [wait for wait in waits if isinstance(wait, asyncio.Task)]
    try:
        await asyncio.wait([*own, *given], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in own:
            task.cancel()


@contextmanager
def _signals(shutdown: Shutdown) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    with as_before():
        for number in CAUGHT:
            loop.add_signal_handler(number, shutdown.request)
        try:
            yield
        finally:
            for number in CAUGHT:
                loop.remove_signal_handler(number)
