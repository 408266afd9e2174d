"""Automatic prefix caching: a prompt's beginning that the cache already holds isn't computed again.

A full block is known by a hash of everything its keys and values depend on: the adapters' generations,
which nothing else ever has (virtual tokens belong to them, so positions do too), their weights, their order
and whether they are combined, the path of low-rank weights, since the two round differently, and all tokens
of the sequence up to the block's last. Generated tokens count like a prompt's, so a chat's next turn finds
the last one's.
"""

from __future__ import annotations

import hashlib
import struct
from array import array

from polygraft.engine.cache.block_pool import BlockPool
from polygraft.engine.sequences.sequence import Sequence


class PrefixCache:
    """Finds and publishes the full blocks of sequences.

    Args:
        enabled: False finds and publishes nothing.
    """

    def __init__(self, pool: BlockPool, *, enabled: bool) -> None:
        self._pool = pool
        self._enabled = enabled

    def match(self, sequence: Sequence) -> list[int]:
        """The blocks that hold a waiting sequence's beginning, with one more holder each.

        The tokens that logits are wanted behind are left to compute.
        """
        blocks: list[int] = []
        if not self._enabled or not sequence.cacheable:
            return blocks
        most = sequence.logits_from // self._pool.block_size
        self._extend_keys(sequence, most)
        for key in sequence.keys[:most]:
            block = self._pool.take(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def publish(self, sequence: Sequence, first: int) -> None:
        """Make a running sequence's full blocks known, from the `first` one on."""
        if not self._enabled or not sequence.cacheable:
            return
        full = sequence.num_computed // self._pool.block_size
        self._extend_keys(sequence, full)
        for at in range(first, full):
            self._pool.publish(sequence.blocks[at], sequence.keys[at])

    def _extend_keys(self, sequence: Sequence, count: int) -> None:
        size = self._pool.block_size
        keys = sequence.keys
        # What stands before an activated LoRA's invocation is the base's, for all to find.
        first = sequence.acts_from // size
        for at in range(len(keys), count):
            before = keys[-1] if keys else _weights_key(sequence, acting=first == 0)
            if at == first > 0:
                before = _digest(before + _weights_key(sequence, acting=True))
            tokens = array("q", sequence.token_ids[at * size : (at + 1) * size])
            keys.append(_digest(before + tokens.tobytes()))


def _weights_key(sequence: Sequence, *, acting: bool) -> bytes:
    """What stands for all weights that a sequence runs on, before or after its adapters act."""
    stack = sequence.stack
    acting_ones = stack.members if acting else ()
    adapters = b"".join(struct.pack("<Qd", adapter.generation, weight) for adapter, weight in acting_ones)
    return _digest(bytes([sequence.copy is not None, stack.combines]) + adapters)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
