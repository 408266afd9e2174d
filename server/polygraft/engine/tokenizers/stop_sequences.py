"""Searches an answer for stop sequences as it is generated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class StopSequences:
    """Holds back a request's text while it may be the start of a stop sequence.

    Special tokens aren't part of an answer's text, yet users write "</s>" to stop at one. So a stop sequence
    that contains a special token's text is searched for in the text with the special tokens written out,
    where a match never begins or ends inside one. All others are searched for in the answer's text.

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
        """Positions of written-out special tokens in the held text."""
        self.matched: str | None = None
        """The stop sequence that was reached."""

    def push(self, text: str) -> str:
        """Add text; returns the text that is now final."""
        self._held += text
        return self._advance()

    def push_hidden(self, text: str) -> str:
        """Add a special token, which has no text in the answer; returns the text that is now final."""
        if not self._spelled:
            return ""
        self._spans.append((len(self._held), len(self._held) + len(text)))
        self._held += text
        return self._advance()

    def flush(self) -> str:
        """Return all that was held, and start anew."""
        visible = self._visible(len(self._held))
        self._held = ""
        self._spans.clear()
        return visible

    def _advance(self) -> str:
        visible = self._visible(len(self._held))
        # Of two that begin before the same visible character, the one with a special token begins earlier.
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
        """The held text up to `end`, without special tokens."""
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
        """The position in the held text after so many characters of the answer's text."""
        for start, end in self._spans:
            if start >= visible:
                break
            visible += end - start
        return visible

    def _inside(self, at: int) -> bool:
        return any(start < at < end for start, end in self._spans)

    def _find(self, one: str) -> int:
        """Where a stop sequence begins in the held text; -1 if nowhere."""
        at = self._held.find(one)
        while at >= 0 and (self._inside(at) or self._inside(at + len(one))):
            at = self._held.find(one, at + 1)
        return at

    def _start(self, one: str) -> int:
        """Where in the held text this stop sequence may have begun; the text's end if nowhere."""
        held = self._held
        first = max(0, len(held) - len(one) + 1)
        return next(
            (at for at in range(first, len(held)) if one.startswith(held[at:]) and not self._inside(at)),
            len(held),
        )


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
