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
    alike = [other for other in known if abs(len(other) - len(asked)) <= len(asked) // 2 + 2]
    same = [other for other in alike if other.casefold() == asked]
    longer = [other for other in known if len(asked) >= 3 and other.casefold().startswith(asked)]
    compared = [other.casefold() for other in alike[:_MOST_COMPARED]]
    close = difflib.get_close_matches(asked, compared, n=3, cutoff=0.6)
    # Several names may differ in case only, so a close one is looked up by its place.
    near = [
        other for found in close for other, folded in zip(alike, compared, strict=False) if folded == found
    ]
    return list(dict.fromkeys([*same, *near, *longer]))[:3]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'a' or 'b'?`, or "" if no known name is near."""
    near = nearest_names(name, known)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


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
        hint = "; leave out the white space around it" if is_name(name.strip()) else ""
        raise InvalidRequest(field, f"must match {_NAME.pattern}, got {shown}{hint}")
    return name
