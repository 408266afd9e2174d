"""Loads the base and the adapters of the store, and makes an engine of them."""

from __future__ import annotations

import logging

from polygraft.base.loader import load_base
from polygraft.base.model_folder import shown_name
from polygraft.config import ServerConfig
from polygraft.engine.engine import Engine
from polygraft.engine.machine.garbage import keep_for_good
from polygraft.engine.machine.machine import Machine
from polygraft.engine.machine.memory_plan import size
from polygraft.engine.machine.threads import set_threads
from polygraft.stages import Stages

log = logging.getLogger(__name__)


def load_engine(config: ServerConfig, stages: Stages | None = None) -> Engine:
    """Load the base and every adapter of the store; `keep_for_good` says what else becomes of objects.

    Args:
        stages: is told how long each stage takes.

    Raises:
        ConfigError, BaseModelError, UnsupportedArchitecture.
    """
    stages = stages or Stages()
    set_threads(config.threads, Machine().cores())
    with stages.timed("base model"):
        log.info("loading the base model %s", shown_name(config.model))
        base = load_base(
            config.model,
            dtype=config.dtype,
            quantization=config.quantization,
            head_quantization=config.head_quantization,
            double_quantization=config.double_quantization,
            device=config.device,
            max_context_length=config.max_context_length,
        )
        # Before the cache is made: in memory that loading has touched, all of it would count at once.
        keep_for_good()
    with stages.timed("engine"):
        engine = Engine(base, config)
        for line in engine.plan.lines():
            log.info("%s", line)
    with stages.timed("adapters"):
        if config.adapters is not None:
            log.info("loading the adapters in %s", config.adapters)
        engine.adapters.load_store()
        engine.finish_background()
    taken = sum(info.compiled_bytes for info in engine.adapters.registry.list())
    if taken > engine.plan.adapters:
        log.warning(
            "memory: the store's adapters take %s, but the plan has %s for them: lower "
            "--kv-cache-bytes or --merged-bytes, or give the server more memory",
            size(taken), size(engine.plan.adapters),
        )  # fmt: skip
    keep_for_good()
    return engine
