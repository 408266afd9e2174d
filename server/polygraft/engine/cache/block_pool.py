"""The paged cache's blocks as numbers: who holds which, and which still hold known tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class BlockPool:
    """A fixed number of blocks of `block_size` tokens.

    A block may have several holders, who only read it. One that is published under a key keeps its contents
    when its last holder leaves, until the block is needed: the longest unused goes first. Other blocks are
    handed out last freed first, since those may still be in the CPU's caches.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks
        self._published: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        # Published ones that nobody holds, in the order in which they were left.
        self._idle: dict[int, None] = {}

    @property
    def free(self) -> int:
        """Blocks that can be handed out."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.free

    @property
    def idle(self) -> int:
        """Blocks that nobody holds and whose contents may be used again."""
        return len(self._idle)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens of one sequence take."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` blocks; there must be as many."""
        assert count <= self.free
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block = next(iter(self._idle))
                del self._idle[block]
                del self._published[self._keys.pop(block)]
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: list[int]) -> None:
        """One holder less for each."""
        # From the last on, so that of a sequence's published blocks the later ones are given up first:
        # without an earlier one a later one is of no use.
        for block in reversed(blocks):
            self._holders[block] -= 1
            assert self._holders[block] >= 0
            if self._holders[block] == 0:
                if block in self._keys:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def publish(self, block: int, key: bytes) -> None:
        """Say what a full block holds; if another one holds the same, that stays the one that is found."""
        if key not in self._published and block not in self._keys:
            self._published[key] = block
            self._keys[block] = key

    def take(self, key: bytes) -> int | None:
        """The block published under a key, with one more holder; or None."""
        block = self._published.get(key)
        if block is not None:
            self._holders[block] += 1
            self._idle.pop(block, None)
        return block

    def check_integrity(self, held: Iterable[int]) -> None:
        """Raise AssertionError unless every block has as many holders as `held` names it times, and the ones
        without are free or idle."""
        counts = Counter(held)
        wrong = [block for block, holders in enumerate(self._holders) if holders != counts[block]]
        assert not wrong, f"blocks with a wrong number of holders: {wrong}"
        left = Counter([*self._free, *self._idle])
        assert all(times == 1 for times in left.values()), "blocks that are free twice"
        assert left.keys() == {block for block in range(self.num_blocks) if not counts[block]}, "blocks lost"
        assert {block: key for key, block in self._published.items()} == self._keys
        assert self._idle.keys() <= self._keys.keys()
        assert self._keys.keys().isdisjoint(self._free)
