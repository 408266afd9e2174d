"""`polygraft demo`: a server, one burst of mixed requests, and what came of it."""

from polygraft.cli.demo.command import demo

__all__ = ["demo"]
