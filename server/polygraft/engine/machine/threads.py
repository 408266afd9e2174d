"""Sets the number of compute threads."""

from __future__ import annotations

import logging
import os

import torch

from polygraft.engine.machine.machine import Cores

log = logging.getLogger(__name__)


def set_threads(asked: int | None, cores: Cores) -> None:
    """Let torch and our operators use as many threads as there are cores for them, and log how many.

    Call it on the thread that computes.
    """
    # torch's default is OMP_NUM_THREADS, or else the number of physical cores.
    wanted = asked or (torch.get_num_threads() if os.environ.get("OMP_NUM_THREADS") else None)
    threads = wanted or min(torch.get_num_threads(), cores.count)
    torch.set_num_threads(threads)
    quota = "" if cores.quota is None else f", CPU quota {cores.quota:g}"
    log.info("threads: %d, of %d cores%s", threads, cores.allowed, quota)
    if threads > cores.count:
        log.warning(
            "threads: %d requested, but there is CPU time for %d, so they wait for each other at every "
            "operator; lower --threads or OMP_NUM_THREADS",
            threads, cores.count,
        )  # fmt: skip
