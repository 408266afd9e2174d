"""The paged cache's blocks as numbers: who holds which, apart from what lies in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class BlockPool:
    """A fixed number of blocks of `block_size` tokens.

    Blocks are handed out last freed first, since those may still be in the CPU's caches.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens of one sequence take."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` blocks; there must be as many."""
        assert count <= len(self._free)
        return [self._free.pop() for _ in range(count)]

    def release(self, blocks: list[int]) -> None:
        """Take blocks back."""
        self._free.extend(reversed(blocks))

    def check_integrity(self, held: Iterable[int]) -> None:
        """Raise AssertionError unless every block is either free or held by exactly one holder."""
        counts = Counter(self._free)
        counts.update(held)
        twice = [block for block, times in counts.items() if times != 1]
        lost = set(range(self.num_blocks)) - counts.keys()
        assert not twice, f"blocks with several holders: {twice}"
        assert not lost, f"blocks lost: {sorted(lost)}"
        assert len(counts) == self.num_blocks, "blocks that don't exist"
