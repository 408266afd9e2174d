"""Gives every waiting request the weights it is to run on."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import ExitStack

from polygraft.adapters.registry import Adapter
from polygraft.engine.events import Events, PathDecision
from polygraft.engine.residency.linear_combinations import LinearCombinations
from polygraft.engine.residency.merged_copies import MergedCopies, MergedCopy
from polygraft.engine.schedule.path_policy import PathPolicy
from polygraft.engine.schedule.scheduler import Scheduler
from polygraft.engine.sequences.generate import GenerateSequence
from polygraft.engine.sequences.sequence import Sequence
from polygraft_types.requests import LoraPath

log = logging.getLogger(__name__)

_BASE, _SEVERAL = 0, -1
"""What stands for a generation where no adapter can be merged."""


class Paths:
    """Resolves MERGED when a request is queued and AUTO when it is about to be admitted.

    Args:
        events: AUTO's decisions are added to it.
        worthwhile: whether merged steps can gain anything; otherwise AUTO never merges.
    """

    def __init__(
        self,
        copies: MergedCopies,
        combinations: LinearCombinations,
        scheduler: Scheduler,
        events: Events,
        *,
        worthwhile: bool,
    ) -> None:
        self._copies = copies
        self._combinations = combinations
        self._scheduler = scheduler
        self._events = events
        self._policy = PathPolicy() if worthwhile else None
        self._hot: MergedCopy | None = None
        self._hold = ExitStack()

    def queue(self, sequence: Sequence) -> None:
        """Settle what can be settled for a sequence that enters the queue."""
        if sequence.stack.combines:
            sequence.combination = self._combinations.get(sequence.stack)
            sequence.hold(sequence.combination)
        adapter = sequence.stack.only
        if adapter is None or not self._copies.fits(adapter):
            sequence.path = LoraPath.UNMERGED
        elif sequence.path is LoraPath.MERGED or adapter.compiled.merged_only:
            sequence.path = LoraPath.MERGED
            copy = self._copies.get(adapter)
            sequence.hold(copy)
            sequence.assign(copy)
        elif self._policy is None:
            sequence.path = LoraPath.UNMERGED

    def decide(self) -> None:
        """Before a step: let the policy see what there is, and assign those that wait for its decision."""
        if self._policy is None:
            return
        requests: Counter[int] = Counter()
        asking: dict[int, Adapter] = {}  # those whose requests leave the path to the server
        for sequence in self._scheduler:
            if isinstance(sequence, GenerateSequence):
                only = sequence.stack.only
                if only is None:
                    requests[_SEVERAL if sequence.stack.adapters else _BASE] += 1
                    continue
                requests[only.generation] += 1
                if sequence.request.lora_path is LoraPath.AUTO and not only.compiled.merged_only:
                    asking[only.generation] = only
        top = asking.get(max(requests, key=lambda g: requests[g])) if requests else None
        before = self._policy.merged
        merged = self._policy.observe(requests, top is not None and self._copies.fits(top))
        if merged != before:
            self._note(asking[merged] if merged is not None else None)
        hot = self._hot
        for sequence in self._scheduler.waiting:
            if sequence.path is LoraPath.AUTO:
                mine = hot is not None and hot.ready and sequence.stack.only is hot.adapter
                sequence.assign(hot if mine else None)

    def _note(self, adapter: Adapter | None) -> None:
        """Take over the policy's decision."""
        if self._hot is not None:
            log.info("auto: adapter %s runs unmerged again", self._hot.adapter.name)
            self._let_go()
        if adapter is not None:
            self._hot = self._copies.get(adapter)
            self._hold.enter_context(self._hot.held())
            log.info("auto: adapter %s holds nearly all requests and is merged", adapter.name)
        self._events.append(PathDecision(LoraPath.UNMERGED if adapter is None else LoraPath.MERGED))

    def _let_go(self) -> None:
        self._hold.close()
        self._hot = None

    def forget(self, adapter: Adapter) -> None:
        """An adapter is gone, so nobody may hold its copy."""
        if self._hot is not None and self._hot.adapter is adapter:
            self._let_go()
            if self._policy is not None:
                self._policy.merged = None

    @property
    def held(self) -> MergedCopy | None:
        """The copy that AUTO holds."""
        return self._hot
