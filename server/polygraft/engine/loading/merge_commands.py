"""Handles UpdateAdapter, and measures merged copies' deviation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

from polygraft.adapters.registry import AdapterRegistry
from polygraft.engine.loading.smoke_tests import SmokeTests
from polygraft.engine.residency.background import BackgroundWork, Job
from polygraft.engine.residency.merged_copies import MergedCopies, MergedCopy
from polygraft.errors import AdapterUnavailable, PolygraftError, ResourceExhausted
from polygraft_types.adapters import AdapterInfo, Deviation, MergeState

DEVIATION_TEXTS = (
    "The committee met on Tuesday and decided to postpone the vote until the spring.",
    "Water boils at a lower temperature on a mountain because the air pressure is lower.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))",
    "Dear Sir or Madam, I am writing to ask whether my order has been sent.",
    "Once upon a time there was a fox who lived at the edge of a great forest.",
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Total: 12 apples, 7 pears and 30 plums, at 2.50 a kilo.",
    "User: What should I cook tonight?\nAssistant: How about a simple tomato soup?",
)
"""Texts on which merged and unmerged logits are compared, at every token but the first few."""
_SKIPPED = 3


class MergeCommands:
    """Serves UpdateAdapter, and measures each copy once, while no request runs.

    Args:
        is_idle: whether no request is running or waiting.
        texts: token ids of `DEVIATION_TEXTS`.
    """

    def __init__(
        self,
        copies: MergedCopies,
        registry: AdapterRegistry,
        background: BackgroundWork,
        smoke_tests: SmokeTests,
        is_idle: Callable[[], bool],
        texts: Sequence[list[int]],
    ) -> None:
        self._copies = copies
        self._registry = registry
        self._background = background
        self._smoke_tests = smoke_tests
        self._is_idle = is_idle
        self._texts = texts
        self._measuring: set[int] = set()
        copies.on_ready = self._plan_measuring

    def update(self, name: str, merged: bool, done: Future[AdapterInfo]) -> None:
        """Keep a merged copy of an adapter, or keep it no longer; `done` gets the outcome."""
        try:
            adapter = self._registry.current(name)
            if merged:
                self._copies.check(adapter)
        except PolygraftError as error:
            done.set_exception(error)
            return
        copy = self._copies.pin(adapter, merged)
        if not merged or copy is None:
            done.set_result(self._registry.get(name))
        else:
            self._background.add(self._await(copy, done))

    def _await(self, copy: MergedCopy, done: Future[AdapterInfo]) -> Job:
        name = copy.adapter.name
        while copy.state is MergeState.MERGING and copy.wanted:
            yield True
        if copy.error is not None:
            done.set_exception(ResourceExhausted(f"adapter {name!r} is not merged: {copy.problem}"))
        elif not self._is_kept(copy):
            done.set_exception(AdapterUnavailable(name, "given up while it was being merged"))
        else:
            done.set_result(self._registry.get(name))

    def _plan_measuring(self, copy: MergedCopy) -> None:
        """Have a new copy measured, unless that has been done or there is nothing to compare it with."""
        adapter = copy.adapter
        measured = adapter.generation in self._measuring or not self._copies.needs_deviation(adapter)
        if not measured and not adapter.compiled.merged_only:
            self._measuring.add(adapter.generation)
            self._background.add(self._measure(copy))

    def _measure(self, copy: MergedCopy) -> Job:
        adapter = copy.adapter
        largest = total = 0.0
        agreeing = positions = values = 0
        yield False
        try:
            for text in self._texts:
                while not self._is_idle():
                    yield False
                several = len(text) - _SKIPPED
                # Between the two as well, the adapter may be unloaded or replaced, and its slot be another's.
                if not self._is_kept(copy):
                    return  # the next copy of this adapter is measured instead
                merged = yield from self._smoke_tests.logits(text, adapter, positions=several, copy=copy)
                if not self._is_kept(copy):
                    return
                unmerged = yield from self._smoke_tests.logits(text, adapter, positions=several)
                difference = (merged - unmerged).abs()
                largest = max(largest, float(difference.max()))
                total += float(difference.double().sum())
                values += difference.numel()
                agreeing += int((merged.argmax(-1) == unmerged.argmax(-1)).sum())
                positions += several
        finally:
            self._measuring.discard(adapter.generation)
        if self._is_kept(copy):
            self._copies.set_deviation(
                adapter, Deviation(largest, total / values, agreeing / positions, positions)
            )

    def _is_kept(self, copy: MergedCopy) -> bool:
        return copy.ready and not copy.forgotten and self._copies.holds(copy)
