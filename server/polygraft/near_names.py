"""Finds the names that somebody may have meant: of adapters, folders and settings."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST_COMPARED = 200
"""Bounds the time on the event loop, where the names of adapters are compared."""


def nearest_names(name: str, known: Iterable[str]) -> list[str]:
    """Return up to three of the known names, the likeliest first: equal but for case, similar, or longer."""
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
    """Return `; did you mean 'a' or 'b'?`, or "" if no known name is near."""
    near = nearest_names(name, known)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
