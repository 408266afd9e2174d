"""The linear combinations of adapters that requests ask for, made at their first use.

A combination is a LoRA like any other: it has a slot of its own in the bank, and its rows share steps with
everything else. It belongs to its adapters' generations and weights, and goes when any of its adapters goes.
"""

from __future__ import annotations

import logging
from collections.abc import Generator

import torch

from polygraft.adapters.linear_combination import combine, combined_bytes
from polygraft.adapters.registry import Adapter
from polygraft.adapters.stack import Runs, Stack
from polygraft.engine.residency.background import BackgroundWork
from polygraft.engine.residency.resident_cache import Outcome, Resident, ResidentCache
from polygraft.errors import AdapterUnavailable, PolygraftError, ResourceExhausted
from polygraft.layers.adapter_bank import AdapterBank

log = logging.getLogger(__name__)


class LinearCombination(Resident):
    """One combination, or what is on its way to be one.

    Args:
        stack: its adapters and their weights.
    """

    def __init__(self, stack: Stack, size: int) -> None:
        super().__init__(stack.key, size)
        self.stack = stack
        self.slot: int | None = None

    @property
    def runs(self) -> Runs:
        """Its side path; none before it is there."""
        return () if self.slot is None else ((self.slot, 1.0),)

    @property
    def name(self) -> str:
        """For the log."""
        return " + ".join(f"{weight:g} {adapter.name}" for adapter, weight in self.stack.members)


class LinearCombinations(ResidentCache[LinearCombination]):
    """Makes and keeps the combinations of one engine. Not thread-safe but for `knows` and `check`.

    Args:
        budget: bytes that all of them together may take.
        most: how many there may be, however small they are.
        dtype: of their sums: sums of 16-bit numbers don't fit in 16 bits.
    """

    def __init__(
        self,
        bank: AdapterBank,
        background: BackgroundWork,
        *,
        budget: int,
        most: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(background, budget=budget, flag="--combined-bytes", most=most)
        self._dtype = dtype
        self._bank = bank

    def knows(self, stack: Stack) -> bool:
        """Whether there is one of the same adapters and weights, or it is being made."""
        found = self._items.get(stack.key)
        return found is not None and found.error is None

    def check(self, stack: Stack) -> None:
        """Raise AdapterUnavailable unless there can be one, now or when others give way."""
        size = combined_bytes(stack.members, self._dtype)
        if size > self.budget:
            raise AdapterUnavailable(
                stack.adapters[0].name,
                f"the LINEAR combination takes {size} bytes, --combined-bytes allows {self.budget}",
            )

    def get(self, stack: Stack) -> LinearCombination:
        """Return a stack's combination; its making starts if it isn't there."""
        return self._get(
            stack.key, lambda: LinearCombination(stack, combined_bytes(stack.members, self._dtype))
        )

    def forget(self, adapter: Adapter) -> None:
        """Drop what was made of an adapter that is gone; no step that uses it may be running."""
        for found in list(self._items.values()):
            if adapter in found.stack.adapters:
                self._forget(found)

    def _fill(self, new: LinearCombination) -> Generator[None, None, None]:
        """Add up the adapters' weights, and give the sum a slot; yields between modules."""
        weights = yield from combine(
            new.stack.members,
            lambda adapter, module: self._bank.low_rank(adapter.slot, adapter.compiled, module),
            self._dtype,
        )
        new.slot = self._bank.install(weights)

    def _empty(self, found: LinearCombination) -> None:
        """Free a combination's slot."""
        if found.slot is not None:
            self._bank.remove(found.slot)
            found.slot = None

    def _failure(self, new: LinearCombination, error: Exception) -> PolygraftError:
        """Log that one can't be made, and return the error for those who wait for it."""
        log.warning("%s: not combined", new.name, exc_info=error)
        return error if isinstance(error, PolygraftError) else ResourceExhausted(str(error))

    def _note(self, found: LinearCombination, outcome: Outcome) -> None:
        """Log what has become of one."""
        if outcome is Outcome.MADE:
            log.info("%s: combined, %d bytes, %.3f s", found.name, found.bytes, found.seconds)
        elif outcome is Outcome.EVICTED:
            log.info("%s: gives way", found.name)
