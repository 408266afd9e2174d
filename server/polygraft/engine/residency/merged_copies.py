"""The merged copies of the base: one for an adapter generation, folded from its weights and the base's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator

from polygraft.adapters.registry import Adapter, AdapterRegistry
from polygraft.engine.events import AdapterChange, AdapterEvent, Events
from polygraft.engine.residency.background import BackgroundWork
from polygraft.engine.residency.resident_cache import Outcome, Resident, ResidentCache
from polygraft.errors import AdapterUnavailable, PolygraftError, ResourceExhausted
from polygraft.layers.adapter_bank import AdapterBank
from polygraft.layers.linear.merging import MergedWeights, WeightSwitch, merge
from polygraft.printable import printable
from polygraft_types.adapters import Deviation, MergedInfo, MergeEvent, MergeOutcome, MergeState

log = logging.getLogger(__name__)

_OUTCOMES = {
    Outcome.MADE: MergeOutcome.OK,
    Outcome.FAILED: MergeOutcome.FAILED,
    Outcome.CANCELLED: MergeOutcome.CANCELLED,
    Outcome.EVICTED: MergeOutcome.EVICTED,
}


class MergedCopy(Resident):
    """One adapter generation's copy, or what is on its way to be one."""

    def __init__(self, adapter: Adapter, size: int) -> None:
        super().__init__(adapter.generation, size)
        self.adapter = adapter
        self.weights: MergedWeights | None = None
        self.problem = ""

    @property
    def state(self) -> MergeState:
        """Where it stands."""
        if self.error is not None:
            return MergeState.FAILED
        return MergeState.READY if self.ready else MergeState.MERGING


class MergedCopies(ResidentCache[MergedCopy]):
    """Makes and keeps copies, and tells the registry where each one stands.

    Args:
        switch: the base's; copies are made from its own weights.
        events: what becomes of copies is added to it.
        budget: bytes that all copies together may take.
        requantize: on a quantized base, keep copies quantized too.
        dtype: of a copy's weights, for the adapters' status.
    """

    def __init__(
        self,
        bank: AdapterBank,
        switch: WeightSwitch,
        registry: AdapterRegistry,
        background: BackgroundWork,
        events: Events,
        *,
        budget: int,
        requantize: bool,
        dtype: str,
    ) -> None:
        super().__init__(background, budget=budget, flag="--merged-bytes")
        self.requantize = requantize
        self.on_ready: Callable[[MergedCopy], None] = lambda copy: None
        self._bank = bank
        self._switch = switch
        self._registry = registry
        self._events = events
        self._dtype = dtype
        self._deviations: dict[int, Deviation] = {}

    def check(self, adapter: Adapter) -> None:
        """Raise AdapterUnavailable unless a copy can be had, now or when others give way.

        May be called on any thread: it reads only what never changes.
        """
        if not adapter.compiled.mergeable:
            parts = adapter.compiled.unmergeable or "nothing"
            why = f"{adapter.compiled.kind} has {parts}, which doesn't fold into the base's weights"
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

    def get(self, adapter: Adapter) -> MergedCopy:
        """Return the adapter's copy; its making starts if it isn't there."""
        before = self.peek(adapter)
        copy = self._get(adapter.generation, lambda: MergedCopy(adapter, self.bytes_for(adapter)))
        if copy is not before:
            self._tell(adapter)
        return copy

    def pin(self, adapter: Adapter, pinned: bool) -> MergedCopy | None:
        """Keep a copy whoever else needs the memory, or don't any more; return the copy, if there is one."""
        copy = self.get(adapter) if pinned else self.peek(adapter)
        if copy is not None:
            copy.pinned = pinned
            self._tell(adapter)
        return copy

    def peek(self, adapter: Adapter) -> MergedCopy | None:
        """Return the adapter's copy as it stands."""
        return self._items.get(adapter.generation)

    def forget(self, adapter: Adapter) -> None:
        """Drop everything of an adapter that is gone; no step that uses it may be running."""
        copy = self.peek(adapter)
        if copy is not None:
            self._forget(copy)
        self._deviations.pop(adapter.generation, None)

    def set_deviation(self, adapter: Adapter, deviation: Deviation) -> None:
        """Note what was measured."""
        self._deviations[adapter.generation] = deviation
        self._tell(adapter)

    def needs_deviation(self, adapter: Adapter) -> bool:
        """Whether it hasn't been measured yet."""
        return adapter.generation not in self._deviations

    def info(self, adapter: Adapter) -> MergedInfo | None:
        """Where an adapter's copy stands; None if there never was one."""
        copy = self.peek(adapter)
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

    def _fill(self, copy: MergedCopy) -> Generator[None, None, None]:
        """Fold the adapter into a copy of the base's weights; yields between modules."""
        slot = copy.adapter.slot
        making = merge(self._bank.merge_sites(slot), slot, requantize=self.requantize)
        while True:
            self._switch.use(None)
            try:
                next(making)
            except StopIteration as end:
                copy.weights = end.value
                assert copy.weights is not None
                copy.bytes = copy.weights.nbytes
                return
            yield

    def _empty(self, copy: MergedCopy) -> None:
        """Free a copy's weights."""
        if copy.weights is not None:
            self._switch.use(None)
            copy.weights = None

    def _failure(self, copy: MergedCopy, error: Exception) -> PolygraftError:
        """Log that a copy can't be made, and return the error for those who wait for it."""
        copy.problem = printable(str(error))
        if isinstance(error, ResourceExhausted):
            log.warning("adapter %s is not merged: %s", copy.adapter.name, error)
        else:
            log.error("adapter %s is not merged", copy.adapter.name, exc_info=error)
        return ResourceExhausted(f"not merged: {copy.problem}")

    def _note(self, copy: MergedCopy, outcome: Outcome) -> None:
        """Something has become of a copy."""
        adapter = copy.adapter
        if outcome is Outcome.MADE:
            log.info("adapter %s is merged: %d bytes, %.3f s", adapter.name, copy.bytes, copy.seconds)
            self.on_ready(copy)
        event = MergeEvent(adapter.name, adapter.compiled.kind, _OUTCOMES[outcome], copy.seconds)
        self._events.append(event)
        self._tell(adapter)

    def _tell(self, adapter: Adapter) -> None:
        """Put where an adapter's copy stands into the registry."""
        shown = self._registry.set_merged(adapter, self.info(adapter))
        if shown is not None:
            self._events.append(AdapterEvent(AdapterChange.CHANGED, shown))
