"""Virtual tokens in the cache: read-only blocks, one copy for all requests of an adapter generation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from polygraft.adapters.primitives import Prefix, SoftPrompt
from polygraft.adapters.registry import Adapter
from polygraft.engine.block_pool import BlockPool
from polygraft.engine.kv_cache import KVCache
from polygraft.engine.sequence import SoftPromptSequence


@dataclass(eq=False, slots=True)
class SharedPrefix:
    """One adapter generation's virtual tokens.

    Args:
        start: position of the first real token behind them.
        ready: False while a soft prompt is on its way through the base.
        users: sequences whose tables hold its blocks.
    """

    adapter: Adapter
    length: int
    start: int
    blocks: list[int] = field(default_factory=list)
    ready: bool = False
    users: int = 0


class SharedPrefixes:
    """The virtual tokens that are in the cache. Those that nobody uses give way when blocks run out."""

    def __init__(self, pool: BlockPool, cache: KVCache) -> None:
        self._pool = pool
        self._cache = cache
        self._ids = itertools.count()
        # In order of last use: keys are generations, since a name may get other weights.
        self._entries: dict[int, SharedPrefix] = {}

    def acquire(self, adapter: Adapter) -> SharedPrefix | SoftPromptSequence | None:
        """The adapter's prefix, with one more user if it is ready; or the sequence that must run before it
        is, which is returned once; or None while there is no room for it."""
        entry = self._entries.pop(adapter.generation, None)
        if entry is not None:
            self._entries[adapter.generation] = entry
            entry.users += entry.ready
            return entry
        primitive = adapter.compiled.prefix
        assert primitive is not None
        start = primitive.start if isinstance(primitive, Prefix) else primitive.virtual_tokens
        entry = SharedPrefix(adapter, primitive.virtual_tokens, start)
        if isinstance(primitive, SoftPrompt):
            self._entries[adapter.generation] = entry
            return SoftPromptSequence(f"soft-prompt-{next(self._ids)}", adapter, primitive.embeddings, entry)
        needed = self._pool.blocks_for(primitive.virtual_tokens)
        if not self.make_room(needed):
            return None
        entry.blocks = self._pool.allocate(needed)
        for layer, (keys, values) in enumerate(zip(primitive.keys, primitive.values, strict=True)):
            self._cache.write(layer, entry.blocks, keys, values)
        entry.ready = True
        entry.users = 1
        self._entries[adapter.generation] = entry
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
        """Drop an adapter that is gone."""
        entry = self._entries.get(adapter.generation)
        if entry is not None:
            assert entry.users == 0
            self._drop(entry)

    def _drop(self, entry: SharedPrefix) -> None:
        del self._entries[entry.adapter.generation]
        self._pool.release(entry.blocks)

    def held_blocks(self) -> Iterator[int]:
        """Every block of every prefix."""
        return itertools.chain.from_iterable(entry.blocks for entry in self._entries.values())

    def check_integrity(self, users: dict[int, int]) -> None:
        """Raise AssertionError unless each prefix has as many users as `users` counts by generation."""
        for generation, entry in self._entries.items():
            assert entry.users == users.get(generation, 0), f"prefix of generation {generation}: wrong users"
