"""What AUTO does: when an adapter's requests run on a merged copy, and when beside the base's weights.

A merged step has no side paths, but serves one adapter alone, while requests of others wait for their own
steps. So merging pays while one adapter holds nearly all the work, and costs as soon as the mix broadens;
dLoRA (OSDI 2024) switches on the same ground. Both changes wait for some steps in which the ground has held,
so that a passing request doesn't tip the scales.
"""

from __future__ import annotations

from collections.abc import Mapping

ENTER_SHARE = 0.95
LEAVE_SHARE = 0.9
ENTER_STEPS = 32
LEAVE_STEPS = 4
"""Leaving is quicker, since it costs nothing: side paths are always there."""


class PathPolicy:
    """Watches how requests spread over adapters, step by step. Adapters are known by their generations."""

    def __init__(self) -> None:
        self.merged: int | None = None
        """The generation whose new AUTO requests run merged."""
        self._candidate: int | None = None
        self._steps = 0

    def observe(self, requests: Mapping[int, int], mergeable: bool) -> int | None:
        """Take note of one step's requests, running and waiting, by generation (0 is the base, -1 what has
        several adapters or a weight).

        Args:
            mergeable: whether the generation that has most of them can be merged.

        Returns:
            `merged`.
        """
        total = sum(requests.values())
        if total == 0:
            return self.merged
        if self.merged is not None:
            holds = requests.get(self.merged, 0) >= LEAVE_SHARE * total
            self._steps = 0 if holds else self._steps + 1
            if self._steps >= LEAVE_STEPS:
                self.merged, self._candidate, self._steps = None, None, 0
            return self.merged
        top = max(requests, key=lambda generation: requests[generation])
        if not mergeable or requests[top] < ENTER_SHARE * total:
            self._candidate, self._steps = None, 0
            return None
        self._steps = self._steps + 1 if top == self._candidate else 1
        self._candidate = top
        if self._steps >= ENTER_STEPS:
            self.merged, self._steps = top, 0
        return self.merged
