"""Looks for stop sequences in an answer as it comes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class StopSequences:
    """The text of one request that isn't certain yet, since it may be the start of a stop sequence.

    Special tokens are no part of an answer's text, and yet "</s>" is what somebody writes who wants to stop
    at one. So a stop sequence with a special token's text in it is looked for in the text with the special
    tokens written out, where it begins and ends as they do: never in the middle of one. All others are looked
    for in the answer's text.

    Args:
        stop: none of them empty.
        hidden: texts of the special tokens.
    """

    def __init__(self, stop: Sequence[str], hidden: Iterable[str]) -> None:
        hidden = [text for text in hidden if text]
        self._spelled = [one for one in stop if any(text in one for text in hidden)]
        self._plain = [one for one in stop if one not in self._spelled]
        self._held = ""
        self._spans: list[tuple[int, int]] = []
        """Where special tokens are written out in what is held."""
        self.matched: str | None = None
        """The stop sequence that was reached."""

    def push(self, text: str) -> str:
        """Add text; returns what has become certain."""
        self._held += text
        return self._advance()

    def push_hidden(self, text: str) -> str:
        """Add a special token, which has no text in the answer; returns what has become certain."""
        if not self._spelled:
            return ""
        self._spans.append((len(self._held), len(self._held) + len(text)))
        self._held += text
        return self._advance()

    def flush(self) -> str:
        """All that was held; what comes next starts anew."""
        visible = self._visible(len(self._held))
        self._held = ""
        self._spans.clear()
        return visible

    def _advance(self) -> str:
        visible = self._visible(len(self._held))
        # Where two begin before the same character, one with a special token begins earlier.
        found = [(len(self._visible(at)), one) for one in self._spelled if (at := self._find(one)) >= 0]
        found += [(at, one) for one in self._plain if (at := visible.find(one)) >= 0]
        if found:
            at, self.matched = min(found, key=lambda pair: pair[0])
            self.flush()
            return visible[:at]
        cut = min(
            [
                *(self._written(len(visible) - _overlap(visible, one)) for one in self._plain),
                *(self._start(one) for one in self._spelled),
            ]
        )
        text = self._visible(cut)
        self._held = self._held[cut:]
        self._spans = [(start - cut, end - cut) for start, end in self._spans if start >= cut]
        return text

    def _visible(self, end: int) -> str:
        """What is held up to there, without special tokens."""
        if not self._spans:
            return self._held[:end]
        parts, last = [], 0
        for start, after in self._spans:
            if start >= end:
                break
            parts.append(self._held[last:start])
            last = after
        return "".join([*parts, self._held[last:end]])

    def _written(self, visible: int) -> int:
        """Where in what is held so many characters of the answer's text end."""
        for start, end in self._spans:
            if start >= visible:
                break
            visible += end - start
        return visible

    def _inside(self, at: int) -> bool:
        return any(start < at < end for start, end in self._spans)

    def _find(self, one: str) -> int:
        """Where a stop sequence begins in what is held; -1 if it isn't there."""
        at = self._held.find(one)
        while at >= 0 and (self._inside(at) or self._inside(at + len(one))):
            at = self._held.find(one, at + 1)
        return at

    def _start(self, one: str) -> int:
        """Where in what is held this stop sequence may have begun; its end if nowhere."""
        held = self._held
        first = max(0, len(held) - len(one) + 1)
        return next(
            (at for at in range(first, len(held)) if one.startswith(held[at:]) and not self._inside(at)),
            len(held),
        )


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` starts with, shorter than `stop` itself."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
