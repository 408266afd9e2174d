"""`polygraft bench compare`: where merged LoRA wins, and where side paths do."""

from polygraft.cli.bench.compare.command import compare

__all__ = ["compare"]
