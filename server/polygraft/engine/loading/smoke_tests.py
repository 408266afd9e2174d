"""A few tokens run through the base to see what an adapter does."""

from __future__ import annotations

import itertools
from collections.abc import Generator

import torch

from polygraft.adapters.registry import Adapter
from polygraft.adapters.stack import Stack
from polygraft.engine.residency.merged_copies import MergedCopies, MergedCopy
from polygraft.engine.schedule.scheduler import Scheduler
from polygraft.engine.sequences.sequence import SmokeTestSequence
from polygraft_types.requests import LoraPath


class SmokeTests:
    """Sequences of the engine's own, which share steps with requests."""

    def __init__(self, scheduler: Scheduler, copies: MergedCopies, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._scheduler = scheduler
        self._copies = copies
        self._ids = itertools.count()

    def logits(
        self,
        tokens: list[int],
        adapter: Adapter | None,
        *,
        positions: int = 1,
        copy: MergedCopy | None = None,
    ) -> Generator[bool | None, None, torch.Tensor]:
        """float32 [positions, vocabulary] behind the last tokens, on the base's weights or a merged copy.

        One is made for an adapter that is served merged only.

        Raises:
            ResourceExhausted: that copy can't be made.
        """
        sequence = SmokeTestSequence(
            f"smoke-test-{next(self._ids)}", tokens, Stack.of(adapter), self._vocabulary, positions=positions
        )
        sequence.stack.pin()
        if copy is None and adapter is not None and adapter.compiled.merged_only:
            copy = self._copies.get(adapter)
        if copy is not None:
            sequence.hold(copy)
            sequence.path = LoraPath.MERGED
            sequence.assign(copy)
        self._scheduler.add(sequence)
        while (logits := sequence.logits) is None:
            if copy is not None and copy.error is not None:
                self._scheduler.remove(sequence)
                raise copy.error
            yield True
        return logits
