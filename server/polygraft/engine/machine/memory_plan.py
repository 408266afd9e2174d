"""Divides the free memory once the base is loaded, so that nothing is promised twice.

The KV cache's pages take memory only when a sequence reaches them, and copies, combinations and adapters are
added one by one. The plan therefore covers the moment when each is as large as it may become.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import psutil
import torch

from polygraft.base.loader import Base
from polygraft.config import ServerConfig
from polygraft.engine.machine.machine import Machine, Memory
from polygraft.errors import ConfigError

log = logging.getLogger(__name__)

CACHE_SHARE = 0.25
MERGED_SHARE = 0.2
COMBINED_SHARE = 0.05
"""Default shares of what there is to divide; adapters get the rest."""

COMBINED_BYTES = 2**28
"""Combinations get more than this only on request."""

SPARE_SHARE = 0.05
SPARE_BYTES = (2**25, 2**30)
"""Share of the limit, and its minimum and maximum: for heap fragmentation, threads and messages."""

LOGIT_COPIES = 1.5
"""A step holds the float32 logits of all its rows, and copies for some of them."""

_FLAGS = {"cache": "--kv-cache-bytes", "merged": "--merged-bytes", "combined": "--combined-bytes"}


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes.

    Args:
        memory: what is there once the base is loaded.
        base: size of its weights, which are no longer free.
        cache, merged, combined: budgets of the KV cache, of merged copies and of linear combinations.
        adapters: what remains for loaded adapters.
        steps: what the largest step takes.
        spare: reserve.
    """

    memory: Memory
    base: int
    cache: int
    merged: int
    combined: int
    adapters: int
    steps: int
    spare: int

    @property
    def promised(self) -> int:
        """Everything that isn't allocated yet."""
        return self.cache + self.merged + self.combined + self.adapters + self.steps + self.spare

    def lines(self) -> list[str]:
        """The plan for the log."""
        parts = {
            "KV cache": self.cache,
            "merged copies": self.merged,
            "combinations": self.combined,
            "adapters": self.adapters,
            "steps": self.steps,
            "spare": self.spare,
        }
        return [
            f"memory: limit {size(self.memory.limit)} ({self.memory.source}), "
            f"free {size(self.memory.free)} beside the base of {size(self.base)}",
            "memory: " + ", ".join(f"{name} {size(count)}" for name, count in parts.items()),
        ]


def plan_memory(
    memory: Memory, own: int, *, base: int, steps: int, asked: dict[str, int | None]
) -> MemoryPlan:
    """Divide what is free.

    Args:
        own: bytes that this process itself uses, so that ending other processes wouldn't free them.
        base, steps: as in MemoryPlan.
        asked: the settings' budgets for "cache", "merged" and "combined"; None to have the plan choose.

    Raises:
        ConfigError: the settings ask for more than there can ever be, or nothing is left for the KV cache.
    """
    least, most = SPARE_BYTES
    spare = int(min(max(memory.limit * SPARE_SHARE, least), most))
    given = {name: count for name, count in asked.items() if count is not None}
    ever = max(0, memory.limit - own)
    if sum(given.values()) > ever:
        largest = max(given, key=lambda name: given[name])
        beside = sum(given.values()) - given[largest]
        raise ConfigError(
            _FLAGS[largest],
            f"{size(given[largest])}"
            + (f" and {size(beside)} of other settings" if beside else "")
            + f" can't be had: of the {size(memory.limit)} of {memory.source}, {size(own)} are in use with "
            f"the base loaded. Ask for at most {size(max(0, ever - beside - steps - spare))}",
        )
    left = memory.free - steps - spare - sum(given.values())
    if left < 0 and given:
        log.warning(
            "memory: %s asked for, but %s are free and the largest step takes %s: the system may kill the "
            "server when all of it is in use",
            size(sum(given.values())), size(memory.free), size(steps),
        )  # fmt: skip
    left = max(0, left)
    shares = {
        "cache": int(left * CACHE_SHARE),
        "merged": int(left * MERGED_SHARE),
        "combined": min(int(left * COMBINED_SHARE), COMBINED_BYTES),
    }
    if asked["cache"] is None and not shares["cache"]:
        raise ConfigError(
            _FLAGS["cache"],
            f"nothing is left for the KV cache: of the {size(memory.limit)} of {memory.source}, "
            f"{size(memory.free)} are free with the base loaded, and a step takes up to {size(steps)}. "
            "Give the server more memory, lower --max-num-batched-tokens, or take a smaller base or "
            "--quantization",
        )
    budgets = {name: given.get(name, share) for name, share in shares.items()}
    ours = sum(share for name, share in shares.items() if name not in given)
    return MemoryPlan(
        memory, base, **budgets, adapters=left - ours, steps=min(steps, memory.free), spare=spare
    )


def plan_for(base: Base, config: ServerConfig, machine: Machine | None = None) -> MemoryPlan:
    """The plan for a base that has just been loaded. Raises: as plan_memory."""
    if base.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(base.device)
        memory = Memory(total, free, str(base.device))
        own = torch.cuda.memory_reserved(base.device)
    else:
        memory = (machine or Machine()).memory()
        own = psutil.Process().memory_info().rss
    return plan_memory(
        memory,
        own,
        base=base.weight_bytes,
        steps=step_bytes(base, config.max_num_batched_tokens),
        asked={
            "cache": config.kv_cache_bytes,
            "merged": config.merged_bytes,
            "combined": config.combined_bytes,
        },
    )


def step_bytes(base: Base, rows: int) -> int:
    """About what a step of so many rows takes at most: its logits, and the widest float32 activations."""
    body = [shape for shape in base.spec.linears.values() if not shape.is_head]
    widest = max((max(shape.in_features, shape.out_features) for shape in body), default=0)
    return int(rows * 4 * (LOGIT_COPIES * base.spec.vocabulary_size + 8 * widest))


def size(count: int) -> str:
    """Bytes in a unit for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
