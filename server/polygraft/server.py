"""`polygraft serve`: load, then serve until told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from typing import NoReturn

from polygraft.config import ServerConfig, split_host_port
from polygraft.engine.async_engine import AsyncEngine
from polygraft.engine.engine import Engine
from polygraft.engine.engine_thread import EngineThread
from polygraft.errors import ConfigError
from polygraft.rpc.serve import Ports, serve
from polygraft.telemetry.logging import configure_logging
from polygraft.telemetry.metrics import Metrics

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
    # A port that is taken is to be known now, and not after the model has been loaded.
    check_free("--listen", config.listen)
    if config.metrics:
        check_free("--metrics", config.metrics)
    # The event loop's thread and the engine's take turns at the interpreter. With Python's own 5 ms the
    # engine, which gives it up at every operator, would wait that long again and again.
    sys.setswitchinterval(SWITCH_SECONDS)
    thread = EngineThread()
    engine = thread.submit(lambda: Engine.from_config(config)).result()
    return asyncio.run(_serve(config, engine, thread))


async def _serve(config: ServerConfig, engine: Engine, thread: EngineThread) -> int:
    metrics = Metrics()
    handle = AsyncEngine(engine, metrics, max_waiting=config.max_waiting, thread=thread)
    handle.start()

    def announce(ports: Ports) -> None:
        line = f"polygraft ready: grpc={_with_port(config.listen, ports.grpc)}"
        if ports.metrics is not None:
            line += f" metrics={_with_port(config.metrics, ports.metrics)}"
        print(line, flush=True)  # noqa: T201 - this line is for programs

    status = await serve(config, handle, metrics, on_ready=announce)
    if handle.failure is not None:
        _leave(status)
    return status


def _leave(status: int) -> NoReturn:
    """End the process at once: a thread that hangs in an operator must not keep it, so that a supervisor can
    start another."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def check_free(flag: str, address: str) -> None:
    """Raise ConfigError unless the address can be listened on now."""
    host, port = split_host_port(flag, address)
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
    except OSError as error:
        raise ConfigError(flag, f"can't listen on {address}: {error.strerror or error}") from error


def _with_port(address: str, port: int) -> str:
    return f"{address.rpartition(':')[0]}:{port}"
