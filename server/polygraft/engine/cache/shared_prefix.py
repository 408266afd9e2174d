"""Virtual tokens in the cache: read-only blocks, one copy for all requests that may share it.

A prefix is what its adapter's file says, whatever else acts on a request. What a soft prompt becomes depends
on all adapters in force, so there is a copy for each such stack, known by generations and weights in their
order; a stack with virtual tokens is never merged, so the path is always the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping

from polygraft.adapters.registry import Adapter
from polygraft.adapters.stack import Stack
from polygraft.core.primitives import Prefix, SoftPrompt
from polygraft.engine.cache.block_pool import BlockPool
from polygraft.engine.cache.kv_cache import KVCache
from polygraft.engine.sequences.prefix import SharedPrefix
from polygraft.engine.sequences.sequence import SoftPromptSequence


class SharedPrefixes:
    """The virtual tokens that are in the cache. Those that nobody uses give way when blocks run out."""

    def __init__(self, pool: BlockPool, cache: KVCache) -> None:
        self._pool = pool
        self._cache = cache
        self._ids = itertools.count()
        # In order of last use: keys are made of generations, since a name may get other weights.
        self._entries: dict[Hashable, SharedPrefix] = {}

    def acquire(self, stack: Stack) -> SharedPrefix | SoftPromptSequence | None:
        """The virtual tokens of one of a stack's adapters, with one more user if they are ready; or the
        sequence that must run before they are, which is returned once; or None while there is no room."""
        assert stack.prefix is not None
        primitive = stack.prefix.compiled.prefix
        assert primitive is not None
        if isinstance(primitive, Prefix):
            stack = Stack.of(stack.prefix)
        entry = self._entries.pop(stack.key, None)
        if entry is not None:
            self._entries[stack.key] = entry
            entry.users += entry.ready
            return entry
        if isinstance(primitive, SoftPrompt):
            entry = SharedPrefix(stack, primitive.virtual_tokens, start=primitive.virtual_tokens)
            self._entries[stack.key] = entry
            return SoftPromptSequence(f"soft-prompt-{next(self._ids)}", stack, primitive.embeddings, entry)
        entry = SharedPrefix(stack, primitive.virtual_tokens, primitive.start, primitive.bare_layers)
        needed = self._pool.blocks_for(primitive.virtual_tokens)
        if not self.make_room(needed):
            return None
        entry.blocks = self._pool.allocate(needed)
        for layer, (keys, values) in enumerate(zip(primitive.keys, primitive.values, strict=True)):
            self._cache.write(layer, entry.blocks, keys, values)
        entry.ready = True
        entry.users = 1
        self._entries[stack.key] = entry
        return entry

    def adopt(self, sequence: SoftPromptSequence) -> None:
        """Take over the blocks of a soft prompt that has run."""
        sequence.target.blocks, sequence.blocks = sequence.blocks, []
        sequence.target.ready = True

    def release(self, prefix: SharedPrefix) -> None:
        """One user less."""
        prefix.users -= 1
        assert prefix.users >= 0

    def make_room(self, blocks: int) -> bool:
        """Whether so many blocks are free, after dropping unused prefixes if need be, the least recently
        used first."""
        for entry in list(self._entries.values()):
            if self._pool.free >= blocks:
                break
            if entry.ready and entry.users == 0:
                self._drop(entry)
        return self._pool.free >= blocks

    def forget(self, adapter: Adapter) -> None:
        """Drop what depends on an adapter that is gone."""
        for entry in [entry for entry in self._entries.values() if adapter in entry.stack.adapters]:
            assert entry.users == 0
            self._drop(entry)

    def _drop(self, entry: SharedPrefix) -> None:
        del self._entries[entry.stack.key]
        self._pool.release(entry.blocks)

    def held_blocks(self) -> Iterator[int]:
        """Every block of every prefix."""
        return itertools.chain.from_iterable(entry.blocks for entry in self._entries.values())

    def check_integrity(self, users: Mapping[Hashable, int]) -> None:
        """Raise AssertionError unless each prefix has as many users as `users` counts by its stack's key."""
        for key, entry in self._entries.items():
            assert entry.users == users.get(key, 0), (
                f"virtual tokens of (generation, weight) {key}: wrong users"
            )
