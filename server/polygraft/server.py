"""`polygraft serve`: load, then serve until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from polygraft.addresses import Address, Reservation
from polygraft.config import ServerConfig
from polygraft.early_signals import force_from_now
from polygraft.engine.machine import Machine
from polygraft.telemetry.logging import configure_logging

if TYPE_CHECKING:
    from polygraft.engine.engine import Engine
    from polygraft.engine.engine_thread import EngineThread
    from polygraft.rpc.serve import Ports

SWITCH_SECONDS = 0.0005


def run(config: ServerConfig) -> int:
    """Serve; returns the exit status.

    Prints one line on standard output once calls are answered: `polygraft ready: grpc=HOST:PORT
    metrics=HOST:PORT` (without the second where metrics are off), so that whoever asked for port 0 learns
    which it became.

    Raises:
        ConfigError, BaseModelError, UnsupportedArchitecture.
    """
    configure_logging(config.log_level)
    addresses = {"--listen": config.listen}
    if config.metrics:
        addresses["--metrics"] = config.metrics
    # Reports a port that can't be had now, not after the model has been loaded.
    _limit_openmp()
    with Reservation(addresses) as ports:
        from polygraft.engine.engine import Engine  # imports torch, which takes seconds
        from polygraft.engine.engine_thread import EngineThread

        # The event loop's thread and the engine's take turns at the interpreter. With Python's own 5 ms the
        # engine, which gives it up at every operator, would wait that long again and again.
        sys.setswitchinterval(SWITCH_SECONDS)
        thread = EngineThread()
        engine = thread.submit(lambda: Engine.from_config(config)).result()
        try:
            return asyncio.run(_serve(config, engine, thread, ports))
        finally:
            force_from_now()


def _limit_openmp() -> None:
    """Tell OpenMP the CPU quota before it is loaded, since it doesn't look for one itself."""
    cores = Machine().cores()
    if cores.count < cores.allowed:
        os.environ.setdefault("OMP_NUM_THREADS", str(cores.count))


async def _serve(config: ServerConfig, engine: Engine, thread: EngineThread, reserved: Reservation) -> int:
    from polygraft.engine.async_engine import AsyncEngine
    from polygraft.rpc.serve import serve
    from polygraft.telemetry.metrics import Metrics

    metrics = Metrics()
    handle = AsyncEngine(engine, metrics, max_waiting=config.max_waiting, thread=thread)
    handle.start()

    def announce(ports: Ports) -> None:
        line = f"polygraft ready: grpc={Address.parse('--listen', config.listen).with_port(ports.grpc)}"
        if ports.metrics is not None:
            line += f" metrics={Address.parse('--metrics', config.metrics).with_port(ports.metrics)}"
        with contextlib.suppress(OSError):  # nobody reads it
            print(line, flush=True)  # noqa: T201 - this line is for programs

    reserved.release()
    status = await serve(config, handle, metrics, on_ready=announce)
    if handle.failure is not None:
        _leave(status)
    return status


def _leave(status: int) -> NoReturn:
    """End the process at once, so that a supervisor can restart it even if a thread hangs in an operator."""
    logging.shutdown()
    with contextlib.suppress(OSError):  # nobody reads it
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
