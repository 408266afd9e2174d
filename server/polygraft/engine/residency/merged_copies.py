"""The merged copies of the base: who uses them, what they take, and how they come and go.

A copy belongs to one adapter generation. It is made as background work, in slices between steps; nothing
else changes while that goes on, and when it fails, or nobody wants it any more, it is gone as if it had never
been.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator

from polygraft.adapters.registry import Adapter
from polygraft.core.adapter_info import Deviation, MergedInfo, MergeEvent, MergeOutcome, MergeState
from polygraft.engine.residency.background import BackgroundWork, Job
from polygraft.errors import AdapterUnavailable, ResourceExhausted
from polygraft.layers.adapter_bank import AdapterBank
from polygraft.layers.linear.merging import MergedWeights, WeightSwitch, merge
from polygraft.printable import printable

log = logging.getLogger(__name__)


class MergedCopy:
    """One adapter generation's copy, or what is on its way to be one.

    Args:
        size: bytes, estimated.
    """

    def __init__(self, adapter: Adapter, size: int) -> None:
        self.adapter = adapter
        self.bytes = size
        self.state = MergeState.MERGING
        self.weights: MergedWeights | None = None
        self.users = 0
        """Sequences that run on it or wait for it."""
        self.pinned = False
        self.problem = ""
        self.seconds = 0.0
        self.reserved = False
        """Whether its bytes count against the budget."""
        self.forgotten = False
        """Its adapter is gone."""

    @property
    def ready(self) -> bool:
        """Whether steps can run on it."""
        return self.state is MergeState.READY

    @property
    def wanted(self) -> bool:
        """Whether anybody would miss it."""
        return not self.forgotten and (self.users > 0 or self.pinned)


class MergedCopies:
    """Keeps copies under a budget; those that nobody uses give way, the least recently used first.

    Args:
        switch: the base's; copies are made from its own weights.
        budget: bytes that all copies together may take.
        requantize: on a quantized base, keep copies quantized too.
        dtype: what a copy's weights are kept in, for the adapters' status.
    """

    def __init__(
        self,
        bank: AdapterBank,
        switch: WeightSwitch,
        background: BackgroundWork,
        *,
        budget: int,
        requantize: bool,
        dtype: str,
    ) -> None:
        self.budget = budget
        self.requantize = requantize
        self._bank = bank
        self._switch = switch
        self._background = background
        self._dtype = dtype
        # By generation, since a name may get other weights; the least recently used first.
        self._copies: dict[int, MergedCopy] = {}
        self._deviations: dict[int, Deviation] = {}
        self._events: list[MergeEvent] = []
        self._changed: dict[Adapter, None] = {}

    def check(self, adapter: Adapter) -> None:
        """Raise AdapterUnavailable unless a copy can be had, now or when others give way.

        May be called on any thread: it reads only what never changes.
        """
        if not adapter.compiled.mergeable:
            beside = adapter.compiled.unmergeable or "nothing"
            why = f"{adapter.compiled.kind} has {beside}, which doesn't fold into the base's weights"
            raise AdapterUnavailable(adapter.name, why)
        if not self.fits(adapter):
            raise AdapterUnavailable(
                adapter.name,
                f"a merged copy takes {self.bytes_for(adapter)} bytes, --merged-bytes allows {self.budget}",
            )

    def fits(self, adapter: Adapter) -> bool:
        """Whether there could be a copy, if others gave way."""
        return adapter.compiled.mergeable and self.bytes_for(adapter) <= self.budget

    def bytes_for(self, adapter: Adapter) -> int:
        """About what an adapter's copy takes."""
        sites = self._bank.merge_sites(adapter.slot)
        return sum(site.merged_bytes(requantize=self.requantize) for site in sites)

    def acquire(self, adapter: Adapter) -> MergedCopy:
        """The adapter's copy with one more user; its making starts if it isn't there."""
        copy = self._get(adapter)
        copy.users += 1
        return copy

    def pin(self, adapter: Adapter, pinned: bool) -> MergedCopy | None:
        """Keep a copy whoever else needs the memory, or don't any more; the copy, if there is one."""
        copy = self._get(adapter) if pinned else self._copies.get(adapter.generation)
        if copy is not None:
            copy.pinned = pinned
            self._changed[adapter] = None
        return copy

    def peek(self, adapter: Adapter) -> MergedCopy | None:
        """The adapter's copy as it stands."""
        return self._copies.get(adapter.generation)

    def holds(self, copy: MergedCopy) -> bool:
        """Whether it is the adapter's copy still, neither evicted nor given up."""
        return self._copies.get(copy.adapter.generation) is copy

    def forget(self, adapter: Adapter) -> None:
        """Drop everything of an adapter that is gone; no step that uses it may be running."""
        copy = self._copies.get(adapter.generation)
        if copy is not None:
            assert copy.users == 0
            copy.forgotten = True
            if copy.state is not MergeState.MERGING:
                self._drop(copy)
        self._deviations.pop(adapter.generation, None)

    def set_deviation(self, adapter: Adapter, deviation: Deviation) -> None:
        """Note what was measured."""
        self._deviations[adapter.generation] = deviation
        self._changed[adapter] = None

    def needs_deviation(self, adapter: Adapter) -> bool:
        """Whether it hasn't been measured yet."""
        return adapter.generation not in self._deviations

    def info(self, adapter: Adapter) -> MergedInfo | None:
        """Where an adapter's copy stands; None if there never was one."""
        copy = self._copies.get(adapter.generation)
        deviation = self._deviations.get(adapter.generation)
        if copy is None:
            return None if deviation is None else MergedInfo(MergeState.EVICTED, deviation=deviation)
        return MergedInfo(
            copy.state,
            copy.pinned,
            copy.bytes if copy.ready else 0,
            self._dtype if copy.ready else "",
            copy.seconds,
            copy.problem,
            deviation,
        )

    @property
    def count(self) -> int:
        """Copies that are there."""
        return sum(copy.ready for copy in self._copies.values())

    @property
    def bytes(self) -> int:
        """What they take, those that are being made included."""
        return sum(copy.bytes for copy in self._copies.values() if copy.reserved)

    def take_changed(self) -> list[Adapter]:
        """The adapters whose copies have changed since the last call."""
        changed, self._changed = list(self._changed), {}
        return changed

    def take_events(self) -> list[MergeEvent]:
        """What has happened since the last call."""
        events, self._events = self._events, []
        return events

    def _get(self, adapter: Adapter) -> MergedCopy:
        copy = self._copies.get(adapter.generation)
        if copy is not None and copy.state is not MergeState.FAILED:
            self._touch(copy)
            return copy
        # Made anew after a failure: whoever asks now may find room.
        self._copies.pop(adapter.generation, None)
        copy = MergedCopy(adapter, self.bytes_for(adapter))
        self._background.add(self._make(copy))
        self._copies[adapter.generation] = copy
        self._changed[adapter] = None
        return copy

    def _touch(self, copy: MergedCopy) -> None:
        self._copies[copy.adapter.generation] = self._copies.pop(copy.adapter.generation)

    def _make(self, copy: MergedCopy) -> Job:
        started = time.monotonic()
        yield None
        try:
            if not (yield from self._reserve(copy)):
                self._cancel(copy)
                return
            making = merge(
                self._bank.merge_sites(copy.adapter.slot), copy.adapter.slot, requantize=self.requantize
            )
            while True:
                self._switch.use(None)
                try:
                    next(making)
                except StopIteration as end:
                    copy.weights = end.value
                    break
                yield None
                if not copy.wanted:
                    self._cancel(copy)
                    return
            assert copy.weights is not None
            copy.bytes = copy.weights.nbytes
        except Exception as error:
            # Whatever it was, memory above all: it must not take the engine down, and nothing has changed.
            copy.weights = None
            copy.reserved = False
            copy.state = MergeState.FAILED
            copy.problem = printable(str(error))
            copy.pinned = False
            if not isinstance(error, ResourceExhausted):
                log.exception("adapter %s is not merged", copy.adapter.name)
            else:
                log.warning("adapter %s is not merged: %s", copy.adapter.name, error)
            self._note(copy, MergeOutcome.FAILED)
            return
        copy.state = MergeState.READY
        copy.seconds = time.monotonic() - started
        log.info("adapter %s is merged: %d bytes, %.3f s", copy.adapter.name, copy.bytes, copy.seconds)
        self._note(copy, MergeOutcome.OK)

    def _reserve(self, copy: MergedCopy) -> Generator[bool | None, None, bool]:
        """Wait until the budget has room; False if nobody wants it any more.

        Raises:
            ResourceExhausted: what is pinned leaves no room.
        """
        while copy.wanted:
            for other in list(self._copies.values()):
                if self.bytes + copy.bytes <= self.budget:
                    break
                if other.ready and not other.users and not other.pinned:
                    self._drop(other)
                    self._note(other, MergeOutcome.EVICTED)
            if self.bytes + copy.bytes <= self.budget:
                copy.reserved = True
                return True
            pinned = sum(other.bytes for other in self._copies.values() if other.pinned and other is not copy)
            if pinned + copy.bytes > self.budget:
                raise ResourceExhausted(
                    f"pinned copies take {pinned} bytes, this one takes {copy.bytes}, --merged-bytes allows "
                    f"{self.budget}"
                )
            yield True
        return False

    def _cancel(self, copy: MergedCopy) -> None:
        self._drop(copy)
        self._note(copy, MergeOutcome.CANCELLED)

    def _drop(self, copy: MergedCopy) -> None:
        if copy.weights is not None:
            self._switch.use(None)
        if self._copies.get(copy.adapter.generation) is copy:
            del self._copies[copy.adapter.generation]

    def _note(self, copy: MergedCopy, outcome: MergeOutcome) -> None:
        adapter = copy.adapter
        self._events.append(MergeEvent(adapter.name, adapter.compiled.kind, outcome, copy.seconds))
        self._changed[adapter] = None

    def check_integrity(self, users: dict[int, int]) -> None:
        """Raise AssertionError unless each copy has as many users as `users` counts by generation."""
        for generation, copy in self._copies.items():
            assert copy.users == users.get(generation, 0), f"copy of generation {generation}: wrong users"
            assert copy.ready == (copy.weights is not None)
        assert self.bytes <= self.budget
