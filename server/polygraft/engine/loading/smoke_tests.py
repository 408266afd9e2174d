"""A few tokens run through the base to see what an adapter does."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence

import torch

from polygraft.adapters.registry import Adapter
from polygraft.adapters.stack import Stack
from polygraft.engine.loading.adapter_rules import SMOKE_TEST_TOKENS
from polygraft.engine.residency.merged_copies import MergedCopies, MergedCopy
from polygraft.engine.schedule.scheduler import Scheduler
from polygraft.engine.sequences.sequence import SmokeTestSequence
from polygraft.errors import AdapterInvalid, BaseModelError
from polygraft_types.requests import LoraPath


class SmokeTests:
    """Sequences of the engine's own, which share steps with requests."""

    def __init__(self, scheduler: Scheduler, copies: MergedCopies, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._scheduler = scheduler
        self._copies = copies
        self._ids = itertools.count()
        self._base_logits: torch.Tensor | None = None
        self._usual = [(31 + 7919 * at) % vocabulary for at in range(SMOKE_TEST_TOKENS)]
        """The tokens that are run unless an adapter has rows of its own."""

    def try_base(self) -> Generator[bool | None, None, None]:
        """Run the base alone. Raises BaseModelError if its logits aren't finite."""
        self._base_logits = yield from self.logits(self._usual, None)
        if not torch.isfinite(self._base_logits).all():
            raise BaseModelError("the base's logits are not finite")

    def try_adapter(
        self, adapter: Adapter, own_tokens: Sequence[int]
    ) -> Generator[bool | None, None, list[str]]:
        """Run a few tokens with an adapter and without, and return warnings.

        Args:
            own_tokens: some that the adapter has rows of its own for.

        Raises:
            AdapterInvalid: its logits aren't finite.
        """
        known = adapter.compiled.vocabulary or self._vocabulary
        tokens = [*own_tokens, *(token % known for token in self._usual)]
        tokens = [*tokens[:SMOKE_TEST_TOKENS], *adapter.compiled.invocation]
        logits = yield from self.logits(tokens, adapter)
        if not torch.isfinite(logits).all():
            raise AdapterInvalid(adapter.name, ["its logits are not finite"])
        base = self._base_logits
        if tokens != self._usual:
            comparable = max(tokens) < self._vocabulary
            base = (yield from self.logits(tokens, None)) if comparable else None
        elif base is None:
            base = self._base_logits = yield from self.logits(self._usual, None)
        if base is not None and torch.equal(logits, base):
            return ["it changes nothing: its logits are the base's"]
        return []

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
