"""One copy of an adapter's virtual tokens in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from polygraft.adapters.stack import Stack


@dataclass(eq=False, slots=True)
class SharedPrefix:
    """One copy of virtual tokens.

    Args:
        stack: what they depend on.
        start: position of the first real token behind them.
        bare: indices of the layers that have none of them.
        ready: False while a soft prompt is on its way through the base.
        users: sequences whose tables hold its blocks.
    """

    stack: Stack
    length: int
    start: int
    bare: tuple[int, ...] = ()
    blocks: list[int] = field(default_factory=list)
    ready: bool = False
    users: int = 0
