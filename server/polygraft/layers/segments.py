"""Rows that the same adapters act on, of those that have weights at a place."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Container, Sequence
from typing import NamedTuple

from polygraft.layers.step import Segment


class Stretch(NamedTuple):
    """Neighbouring rows [first, last), and their segments in the order in which they act."""

    first: int
    last: int
    stack: list[Segment]


def stretches(segments: Sequence[Segment], slots: Container[int]) -> list[Stretch]:
    """The rows that adapters of some slots act on, in their order.

    Args:
        segments: by depth, as `Segments.host` has them.
    """
    mine = [segment for segment in segments if segment.slot in slots]
    bounds = sorted({edge for segment in mine for edge in segment[:2]})
    found = [Stretch(first, last, []) for first, last in itertools.pairwise(bounds)]
    for segment in mine:
        first, last = (bisect.bisect_left(bounds, edge) for edge in segment[:2])
        for stretch in found[first:last]:
            stretch.stack.append(segment)
    return [stretch for stretch in found if stretch.stack]
