"""`polygraft bench compare`: where merged LoRA is faster, and where unmerged is."""

from polygraft.cli.bench.compare.command import compare

__all__ = ["compare"]
