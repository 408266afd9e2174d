"""Properties of scheduling: whatever arrives and leaves, budgets hold, blocks add up, all work ends."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, cast

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polygraft.adapters.registry import Adapter
from polygraft.adapters.stack import Stack
from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.names import STACK
from polygraft.core.primitives import Prefix, SoftPrompt
from polygraft.engine.cache.block_pool import BlockPool
from polygraft.engine.cache.kv_cache import KVCache
from polygraft.engine.cache.prefix_cache import PrefixCache
from polygraft.engine.cache.shared_prefix import SharedPrefixes
from polygraft.engine.schedule.scheduler import Batch, Scheduler
from polygraft.engine.sequences.sequence import Sequence, SoftPromptSequence

BLOCKS, SIZE, MAX_SEQS, BUDGET = 12, 4, 4, 8


def adapters() -> list[Adapter]:
    """One without virtual tokens, two prefixes, one soft prompt, and another without virtual tokens."""
    keys = (torch.zeros(5, 1, 2),)
    primitives = [
        None,
        Prefix(keys, keys, start=5),
        Prefix(keys, keys, start=5),
        SoftPrompt(torch.zeros(6, 2)),
        None,
    ]
    lock = threading.Lock()
    return [
        Adapter(f"a{i}", i + 1, AdapterWeights("kind", 1, prefix=primitive), 0 if primitive else i + 1, lock)
        for i, primitive in enumerate(primitives)
    ]


def stacks(adapters: list[Adapter]) -> list[Stack]:
    """The base, each of the first four alone, and some that share adapters."""
    side, prefix, _, prompt, other = adapters
    several = [
        [(side, 1.0), (other, 0.5)],
        [(side, 0.5), (prompt, 1.0)],
        [(prompt, 1.0), (other, 1.0), (side, 1.0)],
        [(prefix, 1.0), (other, 1.0)],
    ]
    return [Stack(), *map(Stack.of, adapters[:4]), *map(Stack, several)]


class Cacheable(Sequence):
    """As a request's is."""

    cacheable = True


def make_scheduler(*, caching: bool) -> Scheduler:
    pool = BlockPool(BLOCKS, SIZE)
    no_cache = cast("KVCache", SimpleNamespace(write=lambda *args: None))
    return Scheduler(
        pool,
        SharedPrefixes(pool, no_cache),
        PrefixCache(pool, enabled=caching),
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=BUDGET,
    )


class Simulation:
    """Runs batches without a model: a completed sequence gets one more token, or has reached its end.

    All sequences have the same tokens, so that with caching those of one adapter share what they can.
    """

    def __init__(self, *, caching: bool = False) -> None:
        self.scheduler = make_scheduler(caching=caching)
        # What lies in each block, as a real cache would hold it: (stack, tokens up to there).
        self.written: dict[int, tuple[object, int]] = {}
        self.adapters = adapters()
        self.stacks = stacks(self.adapters)
        self.goal: dict[Sequence, int] = {}
        self.finished: list[Sequence] = []
        self.tokens: dict[Sequence, list[int]] = {}

    def arrive(self, prompt: int, new: int, stack: int) -> None:
        chosen = self.stacks[stack]
        sequence = Cacheable(f"s{len(self.goal)}", list(range(prompt)), chosen)
        chosen.pin()
        self.goal[sequence] = prompt + new
        self.tokens[sequence] = list(sequence.token_ids)
        self.scheduler.add(sequence)

    def cancel(self, which: int) -> None:
        live = [s for s in self.scheduler if s in self.goal]
        if live:
            self.scheduler.remove(live[which % len(live)])
            del self.goal[live[which % len(live)]]

    def check_cached(self, sequence: Sequence) -> None:
        """What it didn't compute itself is what it would have computed; what it writes it alone holds."""
        key = sequence.stack.key
        done = sequence.num_computed // SIZE
        assert sequence.num_computed < sequence.num_tokens
        for at, block in enumerate(sequence.blocks):
            if at < done:
                assert self.written[block] == (key, at)
            else:
                assert self.scheduler.pool._holders[block] == 1
                self.written[block] = (key, at)

    def step(self) -> Batch:
        batch = self.scheduler.schedule()
        self.scheduler.check_integrity()
        assert batch.rows <= BUDGET
        assert len(self.scheduler.running) <= MAX_SEQS
        runs = [item.sequence.runs for item in batch.items]
        assert runs == sorted(runs), "rows of the same adapters must be neighbours"
        for item in batch.items:
            sequence = item.sequence
            assert item.count >= 1
            assert item.start == sequence.num_computed
            assert len(sequence.blocks) * SIZE >= item.start + item.count
            assert sequence.wants_prefix == (sequence.prefix is not None)
            assert sequence.prefix is None or sequence.prefix.ready
            self.check_cached(sequence)
            self.scheduler.advance(item)
            if not item.completes:
                continue
            if isinstance(sequence, SoftPromptSequence):
                self.scheduler.prefixes.adopt(sequence)
                self.scheduler.remove(sequence)
                continue
            assert sequence.token_ids == self.tokens[sequence], "a token was lost"
            sequence.token_ids.append(len(sequence.token_ids))
            self.tokens[sequence].append(sequence.token_ids[-1])
            if sequence.num_tokens >= self.goal[sequence]:
                self.scheduler.remove(sequence)
                self.finished.append(sequence)
        self.scheduler.check_integrity()
        return batch


# At most 24 tokens and 6 virtual ones: 8 of the 12 blocks, so that any one fits and four never do.
arrivals = st.tuples(st.just("arrive"), st.integers(1, 16), st.integers(1, 8), st.integers(0, 8))
cancels = st.tuples(st.just("cancel"), st.integers(0, 100), st.just(0), st.just(0))
steps = st.tuples(st.just("step"), st.just(0), st.just(0), st.just(0))


@given(st.lists(st.one_of(arrivals, arrivals, cancels, steps, steps), max_size=60), st.booleans())
@settings(max_examples=400, deadline=None)
def test_everything_ends_and_nothing_leaks(events: list[tuple[str, int, int, int]], caching: bool) -> None:
    simulation = Simulation(caching=caching)
    for name, a, b, c in events:
        if name == "arrive":
            simulation.arrive(a, b, c)
        elif name == "cancel":
            simulation.cancel(a)
        else:
            simulation.step()
    for _ in range(2000):
        if not simulation.scheduler.has_work:
            break
        assert simulation.step().items, "work is left and nothing runs"
    assert not simulation.scheduler.has_work
    assert set(simulation.finished) == set(simulation.goal)
    assert all(adapter.pins == 0 for adapter in simulation.adapters)
    for adapter in simulation.adapters:
        simulation.scheduler.prefixes.forget(adapter)
    assert simulation.scheduler.pool.free == BLOCKS


def run(simulation: Simulation, limit: int = 100) -> list[Batch]:
    batches = []
    while simulation.scheduler.has_work:
        batches.append(simulation.step())
        assert len(batches) < limit
    return batches


def test_decodes_come_before_prefill_chunks_and_share_the_step() -> None:
    simulation = Simulation()
    simulation.arrive(2, 6, 0)
    simulation.step()
    simulation.arrive(20, 1, 0)
    batch = simulation.step()
    assert [(i.sequence.id, i.count) for i in batch.items] == [("s0", 1), ("s1", BUDGET - 1)]


def test_when_blocks_run_out_the_latest_gives_way_and_ends_later() -> None:
    simulation = Simulation()
    for _ in range(3):
        simulation.arrive(4, 20, 0)
    batches = run(simulation)
    assert sum(batch.preempted for batch in batches) > 0
    assert [s.id for s in simulation.finished] == ["s0", "s1", "s2"]


def test_a_prefix_is_in_the_cache_once_for_all_its_users() -> None:
    simulation = Simulation()
    for _ in range(3):
        simulation.arrive(2, 4, 2)
    simulation.step()
    assert len(list(simulation.scheduler.prefixes.held_blocks())) == 2
    run(simulation)
    assert len(list(simulation.scheduler.prefixes.held_blocks())) == 2


def test_a_soft_prompt_runs_once_and_later_arrivals_overtake_it() -> None:
    simulation = Simulation()
    simulation.arrive(2, 3, 4)
    simulation.arrive(2, 3, 4)
    simulation.arrive(2, 3, 0)
    first = simulation.step()
    assert [i.sequence.id for i in first.items] == ["soft-prompt-0", "s2"]
    second = simulation.step()
    assert {i.sequence.id for i in second.items} == {"s0", "s1", "s2"}
    assert not any("soft" in i.sequence.id for b in run(simulation) for i in b.items)


def test_an_unused_prefix_gives_way_and_a_used_one_does_not() -> None:
    simulation = Simulation()
    simulation.arrive(1, 1, 2)
    run(simulation)
    simulation.arrive(1, 30, 3)
    simulation.step()
    simulation.arrive(32, 1, 0)
    run(simulation)
    held = {entry.stack.label for entry in simulation.scheduler.prefixes._entries.values()}
    assert held == {"a2"}


def test_a_soft_prompt_runs_once_for_each_stack_and_a_prefix_is_shared() -> None:
    simulation = Simulation()
    for stack in (4, 6, 7, 4, 6, 7):
        simulation.arrive(1, 1, stack)
        run(simulation)
    simulation.arrive(1, 1, 2)
    run(simulation)
    simulation.arrive(1, 1, 8)
    run(simulation)
    entries = simulation.scheduler.prefixes._entries.values()
    assert [entry.stack.label for entry in entries] == ["a3", STACK, STACK, "a1"]
    simulation.scheduler.prefixes.forget(
        simulation.adapters[4]
    )  # "a4", of the last soft prompt's stack alone
    assert [entry.stack.generations for entry in entries] == [(4,), (1, 4), (2,)]


def test_one_that_waits_behind_a_full_cache_is_not_overtaken_for_ever() -> None:
    simulation = Simulation()
    simulation.arrive(4, 16, 0)
    simulation.step()
    simulation.arrive(40, 1, 0)
    simulation.arrive(4, 16, 0)
    run(simulation)
    assert [s.id for s in simulation.finished] == ["s0", "s1", "s2"]


def test_integrity_check_sees_a_block_that_was_lost_and_one_that_is_held_twice() -> None:
    for damage in ("lost", "twice"):
        simulation = Simulation()
        simulation.arrive(4, 16, 0)
        simulation.step()
        blocks: Any = simulation.scheduler.running[0].blocks
        if damage == "lost":
            blocks.pop()
        else:
            blocks.append(blocks[0])
        try:
            simulation.scheduler.check_integrity()
        except AssertionError:
            continue
        raise AssertionError(f"a block was {damage} and the check saw nothing")


def test_what_one_computed_the_next_one_finds() -> None:
    simulation = Simulation(caching=True)
    simulation.arrive(11, 3, 1)
    run(simulation)
    for adapter in (1, 3, 0):
        simulation.arrive(13, 1, adapter)
    batch = simulation.step()
    # Its first 13 tokens ran, three blocks of them full; another adapter's tokens are others.
    assert [(i.sequence.id, i.start) for i in batch.items if i.sequence.id == "s1"] == [("s1", 12)]
    assert all(i.start == 0 for i in batch.items if i.sequence.id != "s1")


def test_the_last_token_is_always_computed() -> None:
    simulation = Simulation(caching=True)
    simulation.arrive(8, 1, 0)
    run(simulation)
    simulation.arrive(8, 1, 0)
    (item,) = simulation.step().items
    assert (item.start, item.count) == (4, 4)


def test_of_what_is_left_the_longest_unused_is_given_up_and_of_one_its_end() -> None:
    pool = BlockPool(4, SIZE)
    blocks = pool.allocate(3)
    for at, block in enumerate(blocks):
        pool.publish(block, bytes([at]))
    pool.release(blocks)
    assert (pool.free, pool.used, pool.idle) == (4, 0, 3)
    pool.allocate(2)
    assert pool.take(bytes([2])) is None
    assert pool.take(bytes([1])) == blocks[1]
    assert pool.take(bytes([0])) == blocks[0]
    assert pool.free == 0


def test_the_same_contents_are_published_once() -> None:
    pool = BlockPool(4, SIZE)
    first, second = pool.allocate(2)
    pool.publish(first, b"same")
    pool.publish(second, b"same")
    pool.release([first, second])
    assert pool.idle == 1
    assert pool.take(b"same") == first
    pool.check_integrity([first])
