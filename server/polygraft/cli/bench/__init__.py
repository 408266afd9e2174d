"""`polygraft bench`: load on a running server, and what came of it."""

from polygraft.cli.bench.command import bench

__all__ = ["bench"]
