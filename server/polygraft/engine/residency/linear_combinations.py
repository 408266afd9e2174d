"""The linear combinations of adapters that requests ask for: made at their first use, kept under a budget.

A combination is a LoRA like any other: it has a slot of its own in the bank, and its rows share steps with
everything else. It belongs to its adapters' generations and weights, and is made as background work, in
slices between steps, while its requests wait. Those that nobody uses give way, the least recently used first,
and go when any of their adapters goes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Hashable, Mapping

import torch

from polygraft.adapters.linear_combination import combine, combined_bytes
from polygraft.adapters.registry import Adapter
from polygraft.adapters.stack import Runs, Stack
from polygraft.engine.residency.background import BackgroundWork, Job
from polygraft.errors import AdapterUnavailable, PolygraftError, ResourceExhausted
from polygraft.layers.adapter_bank import AdapterBank

log = logging.getLogger(__name__)


class LinearCombination:
    """One of them, or what is on its way to be one.

    Args:
        stack: its adapters and their weights.
        size: bytes.
    """

    def __init__(self, stack: Stack, size: int) -> None:
        self.stack = stack
        self.bytes = size
        self.slot: int | None = None
        self.users = 0
        """Sequences that run with it or wait for it."""
        self.reserved = False
        """Whether its bytes count against the budget."""
        self.forgotten = False
        """An adapter of it is gone."""
        self.error: PolygraftError | None = None
        """Why it can't be made."""

    @property
    def ready(self) -> bool:
        """Whether it is there."""
        return self.slot is not None

    @property
    def runs(self) -> Runs:
        """Its side path; none before it is there."""
        return () if self.slot is None else ((self.slot, 1.0),)

    @property
    def wanted(self) -> bool:
        """Whether anybody would miss it."""
        return self.users > 0 and not self.forgotten

    @property
    def name(self) -> str:
        """For the log."""
        return " + ".join(f"{weight:g} {adapter.name}" for adapter, weight in self.stack.members)


class LinearCombinations:
    """Those of one engine; like it, not thread-safe but for `knows` and `check`.

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
        self.budget = budget
        self._dtype = dtype
        self._most = most
        self._bank = bank
        self._background = background
        # By the stacks' keys, since a name may get other weights; the least recently used first.
        self._all: dict[Hashable, LinearCombination] = {}

    def knows(self, stack: Stack) -> bool:
        """Whether there is one of the same adapters and weights, or it is being made."""
        return stack.key in self._all

    def check(self, stack: Stack) -> None:
        """Raise AdapterUnavailable unless there can be one, now or when others give way."""
        size = combined_bytes(stack.members, self._dtype)
        if size > self.budget:
            raise AdapterUnavailable(
                stack.adapters[0].name,
                f"the LINEAR combination takes {size} bytes, --combined-bytes allows {self.budget}",
            )

    def acquire(self, stack: Stack) -> LinearCombination:
        """A stack's combination with one more user; its making starts if it isn't there."""
        found = self._all.pop(stack.key, None)
        if found is None:
            found = LinearCombination(stack, combined_bytes(stack.members, self._dtype))
            self._background.add(self._make(found))
        self._all[stack.key] = found
        found.users += 1
        return found

    def forget(self, adapter: Adapter) -> None:
        """Drop what was made of an adapter that is gone; no step that uses it may be running."""
        for found in [found for found in self._all.values() if adapter in found.stack.adapters]:
            assert found.users == 0
            found.forgotten = True  # its making ends before it reads anything more
            self._drop(found)

    @property
    def count(self) -> int:
        """How many are there."""
        return sum(found.ready for found in self._all.values())

    @property
    def bytes(self) -> int:
        """What they take, those that are being made included."""
        return sum(found.bytes for found in self._all.values() if found.reserved)

    def _make(self, new: LinearCombination) -> Job:
        started = time.monotonic()
        yield None
        try:
            if not (yield from self._reserve(new)):
                self._drop(new)
                return
            making = combine(
                new.stack.members,
                lambda adapter, module: self._bank.low_rank(adapter.slot, adapter.compiled, module),
                self._dtype,
            )
            while True:
                try:
                    next(making)
                except StopIteration as end:
                    new.slot = self._bank.install(end.value)
                    break
                yield None
                if not new.wanted:
                    self._drop(new)
                    return
        except Exception as error:
            # Whatever it was, memory above all: it must not take the engine down, and nothing has changed.
            # Who waits for it learns it from the error; whoever asks next may find memory.
            self._drop(new)
            new.error = error if isinstance(error, PolygraftError) else ResourceExhausted(str(error))
            log.warning("%s: not combined", new.name, exc_info=error)
            return
        log.info("%s: combined, %d bytes, %.3f s", new.name, new.bytes, time.monotonic() - started)

    def _reserve(self, new: LinearCombination) -> Generator[bool | None, None, bool]:
        """Wait until the budget has room; False if nobody wants it any more."""
        while new.wanted:
            for other in list(self._all.values()):
                if self._has_room(new):
                    break
                if other.ready and not other.users:
                    log.info("%s: gives way", other.name)
                    self._drop(other)
            if self._has_room(new):
                new.reserved = True
                return True
            yield True
        return False

    def _has_room(self, new: LinearCombination) -> bool:
        reserved = sum(found.reserved for found in self._all.values())
        return reserved < self._most and self.bytes + new.bytes <= self.budget

    def _drop(self, found: LinearCombination) -> None:
        if self._all.get(found.stack.key) is found:
            del self._all[found.stack.key]
        if found.slot is not None:
            self._bank.remove(found.slot)
            found.slot = None

    def check_integrity(self, users: Mapping[Hashable, int]) -> None:
        """Raise AssertionError unless each has as many users as `users` counts by its stack's key."""
        for key, found in self._all.items():
            assert found.users == users.get(key, 0), f"combination {found.name}: wrong users"
        assert self.bytes <= self.budget
