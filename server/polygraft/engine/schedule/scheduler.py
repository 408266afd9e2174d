"""Decides what runs in a step: continuous batching, chunked prefill, preemption by recompute."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from polygraft.engine.cache.block_pool import BlockPool
from polygraft.engine.cache.prefix_cache import PrefixCache
from polygraft.engine.cache.shared_prefix import SharedPrefixes
from polygraft.engine.residency.merged_copies import MergedCopy
from polygraft.engine.schedule.step_cost import StepBudget, StepCost, Work
from polygraft.engine.sequences.prefix import SharedPrefix
from polygraft.engine.sequences.sequence import Sequence, SoftPromptSequence
from polygraft_types.requests import LoraPath

if TYPE_CHECKING:
    from polygraft.adapters.stack import Runs


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`count` tokens of a sequence, from `start` on."""

    sequence: Sequence
    start: int
    count: int

    @property
    def completes(self) -> bool:
        """Whether its last known token is among them."""
        return self.start + self.count == self.sequence.num_tokens

    @property
    def logit_rows(self) -> range:
        """Which of these tokens, counted from the first, logits are wanted behind."""
        return range(max(0, self.sequence.logits_from - self.start), self.count)

    def runs(self, rows: range) -> list[tuple[Runs, int]]:
        """The side paths of some of these tokens in order, and how many have them."""
        before = min(max(0, self.sequence.acts_from - self.start - rows.start), len(rows))
        acting = (self.sequence.runs, len(rows) - before)
        return [((), before), acting] if before else [acting]


@dataclass(slots=True)
class Batch:
    """What one step runs, prefill chunks and decodes together.

    Args:
        items: filled by the scheduler, ordered by adapters, so that the rows of equal ones are neighbours.
        preempted: sequences that lost their blocks while it was put together.
        copy: the merged copy that all of it runs on; None is the base's own weights with side paths.
        work: what it computes, to learn its cost; sequences that lost their blocks are included.
        waited: steps that its sequences had to leave to those of other copies since their last one.
    """

    items: list[Scheduled] = field(default_factory=list)
    preempted: int = 0
    copy: MergedCopy | None = None
    work: Work = field(default_factory=Work)
    waited: int = 0

    @property
    def rows(self) -> int:
        """Tokens that go through the base."""
        return sum(item.count for item in self.items)


class Scheduler:
    """First come, first served, under four budgets: sequences, tokens of a step, its expected time, blocks.

    When blocks run out, the latest running sequence gives its blocks back and is recomputed later from
    its tokens, the generated ones included, so nothing is lost.

    A step runs on one set of weights: the base's own, where any mix of adapters shares it, or one merged
    copy's. They take turns, the one that has waited longest first: of n that have work each gets every n-th
    step, and every request one token in n steps.

    Args:
        max_num_seqs: most sequences that run at once.
        max_num_batched_tokens: most tokens of a step.
        cost: predicts a step's time and holds its limit; None for no limit.
    """

    def __init__(
        self,
        pool: BlockPool,
        prefixes: SharedPrefixes,
        cache: PrefixCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        cost: StepCost | None = None,
    ) -> None:
        self.pool = pool
        self.prefixes = prefixes
        self._cache = cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self._cost = cost
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._orders = itertools.count()
        self._waited: dict[MergedCopy | None, int] = {}
        self._blocked: Sequence | None = None
        """The waiting sequence that found no room: nothing that came later takes it."""

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind all others."""
        sequence.order = next(self._orders)
        self.waiting.append(sequence)

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences, running and waiting."""
        return itertools.chain(self.running, self.waiting)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is left."""
        return bool(self.running or self.waiting)

    def schedule(self) -> Batch:
        """Put the next step together. It is empty if all that waits needs a copy that isn't there."""
        turns = self._turns()
        for copy in turns:
            batch = self._fill(copy)
            if batch.items:
                batch.waited = self._waited.get(copy, 0)
                self._waited = {other: self._waited.get(other, 0) + 1 for other in turns if other is not copy}
                return batch
        return Batch()

    def _turns(self) -> list[MergedCopy | None]:
        """The weights that sequences could run on now, the longest waiting first."""
        able = dict.fromkeys(s.copy for s in self if s.copy is None or s.copy.ready)
        return sorted(able, key=lambda copy: -self._waited.get(copy, 0))

    def _fill(self, copy: MergedCopy | None) -> Batch:
        """Decodes first, so that a long prompt delays nobody's next token."""
        batch = Batch(copy=copy)
        chosen: dict[Sequence, Scheduled] = {}
        budget = StepBudget(self.max_num_batched_tokens, self._cost)
        batch.work = budget.work
        mine = (sequence for sequence in self.running if sequence.copy is copy)
        for sequence in sorted(mine, key=lambda s: (not s.decodes, s.order)):
            if budget.tokens == 0:
                break
            if not sequence.blocks:
                continue  # preempted while this step was put together
            if sequence.decodes:
                count = 1
                budget.decode(sequence)
            elif budget.exhausted:
                break
            else:
                count = budget.fill(sequence, sequence.num_computed)
            victims = self._reserve(sequence, count)
            for victim in victims:
                given_back = chosen.pop(victim, None)
                budget.give_back(given_back.count if given_back else 0)
            batch.preempted += len(victims)
            if sequence in victims:
                budget.give_back(count)
            else:
                chosen[sequence] = Scheduled(sequence, sequence.num_computed, count)
        if not batch.preempted:  # what was just taken away would be given back at once
            self._admit(copy, budget, chosen)
        batch.items = sorted(chosen.values(), key=lambda item: item.sequence.runs)
        return batch

    def _reserve(self, sequence: Sequence, count: int) -> list[Sequence]:
        """Get a running sequence the blocks for `count` more tokens; returns who had to give way for it,
        which may be the sequence itself."""
        needed = self.pool.blocks_for(sequence.num_computed + count) - len(sequence.blocks)
        victims: list[Sequence] = []
        while not self.prefixes.make_room(needed):
            victim = max(self.running, key=lambda s: s.order)
            self.running.remove(victim)
            self._free(victim)
            victim.on_preempted()
            bisect.insort(self.waiting, victim, key=lambda s: s.order)
            victims.append(victim)
            if victim is sequence:
                return victims
        sequence.blocks += self.pool.allocate(needed)
        return victims

    def _admit(self, copy: MergedCopy | None, budget: StepBudget, chosen: dict[Sequence, Scheduled]) -> None:
        for sequence in list(self.waiting):
            if budget.exhausted or len(self.running) >= self.max_num_seqs:
                return
            if sequence.copy is not copy:
                if sequence is self._blocked:
                    return
                continue
            if sequence.combination is not None and not sequence.combination.ready:
                continue  # later arrivals needn't wait for this one's weights
            prefix = None
            if sequence.wants_prefix:
                acquired = self.prefixes.acquire(sequence.stack)
                if acquired is None:
                    self._blocked = sequence
                    return
                if isinstance(acquired, SoftPromptSequence):
                    acquired.order = sequence.order
                    acquired.stack.pin()
                    self.waiting.insert(self.waiting.index(sequence), acquired)
                    self._start(acquired, None, budget, chosen)
                    continue
                if not acquired.ready:
                    continue  # later arrivals needn't wait for this one's virtual tokens
                prefix = acquired
            if not self._start(sequence, prefix, budget, chosen):
                if prefix is not None:
                    self.prefixes.release(prefix)
                self._blocked = sequence
                return

    def _start(
        self,
        sequence: Sequence,
        prefix: SharedPrefix | None,
        budget: StepBudget,
        chosen: dict[Sequence, Scheduled],
    ) -> bool:
        """Let a waiting sequence run if there is room; returns whether there is.

        Room for all its known tokens, and one block for every sequence that runs already: otherwise one
        that was just preempted would come back only to be preempted again.
        """
        cached = self._cache.match(sequence)
        needed = self.pool.blocks_for(sequence.num_tokens) - len(cached)
        if not self.prefixes.make_room(needed + len(self.running)):
            self.pool.release(cached)
            return False
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self._settle(sequence)
        sequence.prefix = prefix
        sequence.num_computed = len(cached) * self.pool.block_size
        count = budget.fill(sequence, sequence.num_computed)
        fresh = self.pool.blocks_for(sequence.num_computed + count) - len(cached)
        sequence.blocks = cached + self.pool.allocate(fresh)
        chosen[sequence] = Scheduled(sequence, sequence.num_computed, count)
        return True

    def _settle(self, sequence: Sequence) -> None:
        """From here on a sequence keeps its path."""
        if sequence is self._blocked:
            self._blocked = None
        if sequence.path is LoraPath.AUTO:
            sequence.path = LoraPath.UNMERGED if sequence.copy is None else LoraPath.MERGED
            if sequence.copy is not None:
                sequence.hold(sequence.copy)

    def advance(self, item: Scheduled) -> None:
        """Take note that a part of a batch has run: its keys and values are in the cache."""
        first = item.sequence.num_computed // self.pool.block_size
        item.sequence.num_computed += item.count
        self._cache.publish(item.sequence, first)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, whatever it was doing, and free what it holds."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._free(sequence)
        else:
            self.waiting.remove(sequence)
            if sequence is self._blocked:
                self._blocked = None
        sequence.release()

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0
        if sequence.prefix is not None:
            self.prefixes.release(sequence.prefix)
            sequence.prefix = None

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks and prefixes add up; cheap enough to call when idle."""
        own = itertools.chain.from_iterable(sequence.blocks for sequence in self.running)
        self.pool.check_integrity(itertools.chain(own, self.prefixes.held_blocks()))
        assert all(not s.blocks and s.prefix is None and s.num_computed == 0 for s in self.waiting)
        self.prefixes.check_integrity(
            Counter(s.prefix.stack.key for s in self.running if s.prefix is not None)
        )
        for sequence in self.running:
            assert len(sequence.blocks) >= self.pool.blocks_for(sequence.num_computed)
