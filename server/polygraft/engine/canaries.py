"""A few tokens run through the base to see what an adapter does."""

from __future__ import annotations

import itertools
from collections.abc import Generator

import torch

from polygraft.adapters.registry import Adapter
from polygraft.adapters.stack import Stack
from polygraft.engine.merged_copies import MergedCopy
from polygraft.engine.request import LoraPath
from polygraft.engine.scheduler import Scheduler
from polygraft.engine.sequence import CanarySequence


class Canaries:
    """Sequences of the engine's own, which share steps with requests."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._ids = itertools.count()

    def logits(
        self,
        tokens: list[int],
        adapter: Adapter | None,
        *,
        positions: int = 1,
        copy: MergedCopy | None = None,
    ) -> Generator[bool | None, None, torch.Tensor]:
        """float32 [positions, vocabulary] behind the last tokens, on the base's weights or a merged copy."""
        sequence = CanarySequence(f"canary-{next(self._ids)}", tokens, Stack.of(adapter), positions=positions)
        sequence.stack.pin()
        if copy is not None:
            copy.users += 1
            sequence.path = LoraPath.MERGED
            sequence.assign(copy)
        self._scheduler.add(sequence)
        while (logits := sequence.logits) is None:
            yield True
        return logits
