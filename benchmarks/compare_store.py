"""A store for `polygraft bench compare`: alike LoRA adapters for the mixes, other ranks, some prefixes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from benchmarks.suite.stores import lora_store, prefix_store, rank_store
from polygraft.base.loader import inspect_without_weights

COUNT = 32
RANKS = (2, 32, 64)
"""Beside the 8 that the others have."""
VIRTUAL_TOKENS = (8, 32, 128)


def main() -> None:
    store = Path(sys.argv[1])
    shutil.rmtree(store, ignore_errors=True)
    base = inspect_without_weights("default")
    lora_store(store, base, COUNT)
    rank_store(store, base, RANKS, each=1)
    prefix_store(store, base, VIRTUAL_TOKENS)


if __name__ == "__main__":
    main()
