"""What an adapter may be called."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from polygraft.errors import InvalidRequest

STACK = "_stack"
"""What metrics call several adapters of one request; no adapter can have it for a name."""
STACK_KIND = "stack"
"""Their kind."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


_MOST_COMPARED = 200
"""Comparing a name with so many takes about 6 ms, on the event loop."""


def nearest_names(name: str, known: Iterable[str]) -> list[str]:
    """Up to three of the known names that somebody may have meant, the likeliest first."""
    known, asked = list(known), name.strip().casefold()
    alike = [other for other in known if abs(len(other) - len(name)) <= len(name) // 2 + 2]
    same = [other for other in alike if other.casefold() == asked]
    inside = [other for other in known if len(asked) >= 3 and other.casefold().startswith(asked)]
    close = difflib.get_close_matches(name, alike[:_MOST_COMPARED], n=3, cutoff=0.6)
    return list(dict.fromkeys([*same, *close, *inside]))[:3]


def is_name(name: str) -> bool:
    """Whether an adapter can have this name."""
    return _NAME.fullmatch(name) is not None


NOT_A_NAME = f"an adapter's name must match {_NAME.pattern}"


def check_name(name: str, field: str = "name") -> str:
    """The name, checked.

    Args:
        field: path of the request's field that it came in.

    Raises:
        InvalidRequest: no adapter can have it.
    """
    if not is_name(name):
        shown = repr(name if len(name) <= 40 else name[:40] + "...")
        raise InvalidRequest(field, f"must match {_NAME.pattern}, got {shown}")
    return name
