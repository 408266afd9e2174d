"""A step on a few rows, to compare a fused operator with the modules that it replaces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from polygraft.layers.step import NO_SEGMENTS, AttentionPlan, StepContext

_ROWS = 5


def trial_rows(key_cache: torch.Tensor) -> int:
    """Return a trial step's number of rows, as many as fit in a layer's key cache but at most 5."""
    return min(_ROWS, key_cache.shape[0] * key_cache.shape[3])


@contextmanager
def trial_step(step: StepContext, key_cache: torch.Tensor) -> Iterator[int]:
    """Begin a step of one sequence in the cache's first blocks, and yield its number of rows.

    Args:
        key_cache: of any layer, [blocks, kv_heads, head_dim, block_size].
    """
    rows, size = trial_rows(key_cache), key_cache.shape[3]
    plan = AttentionPlan(
        slot_mapping=torch.arange(rows),
        query_start=torch.tensor([0, rows], dtype=torch.int32),
        context_lens=torch.tensor([rows], dtype=torch.int32),
        prefix_lens=torch.tensor([0], dtype=torch.int32),
        block_tables=torch.arange(-(-rows // size), dtype=torch.int32)[None],
    )
    step.begin(plan, NO_SEGMENTS, NO_SEGMENTS, rows)
    try:
        with torch.inference_mode():
            yield rows
    finally:
        step.end()
