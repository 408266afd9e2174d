"""`polygraft serve`: load, then serve until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

import polygraft
from polygraft.addresses import Address, Reservation
from polygraft.config import ServerConfig
from polygraft.config_sources import mistaken_variables
from polygraft.early_signals import force_from_now
from polygraft.engine.machine.machine import Machine
from polygraft.errors import PolygraftError
from polygraft.stages import Stages
from polygraft.telemetry.logging import adopt_libraries, configure_logging

if TYPE_CHECKING:
    from polygraft.engine.engine import Engine
    from polygraft.engine.engine_thread import EngineThread
    from polygraft.telemetry.metrics import Metrics
    from polygraft.telemetry.probes import Probes

SWITCH_SECONDS = 0.0005

log = logging.getLogger(__name__)


def run(config: ServerConfig) -> int:
    """Serve; returns the exit status.

    Prints one line on standard output once calls are answered: `polygraft ready: grpc=HOST:PORT
    metrics=HOST:PORT` (without the second where metrics are off), so that whoever asked for port 0 learns
    which it became. `/healthz` and `/readyz` answer before the model is loaded.

    Raises:
        ConfigError, BaseModelError, UnsupportedArchitecture.
    """
    stages = Stages()
    configure_logging(config.log_level, config.log_format)
    logging.captureWarnings(True)
    log.info("polygraft %s starts: importing torch and transformers", polygraft.__version__)
    for warning in mistaken_variables(ServerConfig.model_fields, os.environ):
        log.warning("%s", warning)
    listen, metrics_setting = config.name_of("listen"), config.name_of("metrics")
    addresses = {listen: config.listen}
    if config.metrics:
        addresses[metrics_setting] = config.metrics
    _limit_openmp()
    # Reports a port that can't be had now, not after the model has been loaded.
    with (
        failure_logged(config.log_format),
        Reservation(addresses) as reserved,
        contextlib.ExitStack() as stack,
    ):
        from polygraft.telemetry.endpoint import MetricsEndpoint
        from polygraft.telemetry.metrics import Metrics
        from polygraft.telemetry.probes import Probes

        metrics, probes, scraped = Metrics(), Probes(), None
        if config.metrics:
            reserved.release(metrics_setting)
            endpoint = stack.enter_context(MetricsEndpoint(metrics.registry, config.metrics, probes))
            scraped = Address.parse(metrics_setting, config.metrics).with_port(endpoint.port)
        with stages.timed("libraries"):
            # These import torch, which takes seconds.
            from polygraft.engine.engine_thread import EngineThread
            from polygraft.engine.load_engine import load_engine
        adopt_libraries()

        # The event loop's thread and the engine's take turns at the interpreter. With Python's own 5 ms the
        # engine, which gives it up at every operator, would wait that long again and again.
        sys.setswitchinterval(SWITCH_SECONDS)
        thread = EngineThread()
        engine = thread.submit(lambda: load_engine(config, stages)).result()
        try:
            reserved.release(listen)
            return asyncio.run(_serve(config, engine, thread, metrics, probes, scraped, stages))
        finally:
            force_from_now()


@contextlib.contextmanager
def failure_logged(form: str) -> Iterator[None]:
    """Put what ends the process into a JSON log; the command line says it only as text."""
    try:
        yield
    except Exception as error:
        if form == "json":
            expected = isinstance(error, PolygraftError)
            log.critical("the server ends: %s", error, exc_info=None if expected else error)
        raise


def _limit_openmp() -> None:
    """Tell OpenMP the CPU quota before it is loaded, since it doesn't look for one itself."""
    cores = Machine().cores()
    if cores.count < cores.allowed:
        os.environ.setdefault("OMP_NUM_THREADS", str(cores.count))


async def _serve(
    config: ServerConfig,
    engine: Engine,
    thread: EngineThread,
    metrics: Metrics,
    probes: Probes,
    scraped: Address | None,
    stages: Stages,
) -> int:
    from polygraft.engine.async_engine import AsyncEngine
    from polygraft.rpc.lifecycle import serve
    from polygraft.telemetry.greeting import greeting

    handle = AsyncEngine(engine, metrics, max_waiting=config.max_waiting, thread=thread)
    handle.start()
    metrics.describe_model(handle.model, polygraft.__version__)

    def announce(port: int) -> None:
        listening = Address.parse(config.name_of("listen"), config.listen).with_port(port)
        for line in greeting(handle.model, handle.list_adapters(), listening, scraped):
            log.info("%s", line)
        log.info("ready in %s", stages.summary())
        line = f"polygraft ready: grpc={listening}" + (f" metrics={scraped}" if scraped else "")
        with contextlib.suppress(OSError):  # nobody reads it
            print(line, flush=True)  # noqa: T201 - this line is for programs

    status = await serve(config, handle, metrics, probes=probes, on_ready=announce)
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
