"""Keeps the number of adapter labels bounded: a scrape must not grow with the store."""

from __future__ import annotations

from polygraft.core.names import STACK

BASE = ""
"""The base model's adapter label; no adapter can have it for a name."""
OTHER = "_other"
"""The label of all adapters beyond the limit; no adapter can have it for a name."""


class AdapterLabels:
    """Gives the first `limit` adapter names in use a label of their own, and the rest a common one.

    Requests of several adapters have a common one too, whatever the adapters are.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._names: set[str] = set()

    def label(self, name: str) -> str:
        """The label to count `name` under."""
        if name in (BASE, STACK) or name in self._names:
            return name
        if len(self._names) < self._limit:
            self._names.add(name)
            return name
        return OTHER

    def forget(self, name: str) -> bool:
        """Free the place of `name`; returns whether it had one."""
        if name not in self._names:
            return False
        self._names.remove(name)
        return True
