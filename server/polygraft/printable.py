"""Text from strangers (files, names, fields of requests) as it may stand in a log, an error or a listing.

A name that holds a line break could forge a line of the log, one with terminal codes could hide it, and one
of a hundred megabytes could fill a message: whatever is shown goes through here first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

MAX_TEXTS = 50
"""Most texts of a list that are kept; how many more there were is said instead of the rest."""
MAX_CHARACTERS = 500
"""Most characters of one of them."""


def printable(text: str, limit: int = MAX_CHARACTERS) -> str:
    """At most `limit` characters in one line: what can't be printed is escaped, the rest is cut off."""
    shown = text[: limit + 1]
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def printable_texts(texts: Collection[str]) -> tuple[str, ...]:
    """The first `MAX_TEXTS` of them, each printable, and how many more there are."""
    return Texts(texts).told()


class Texts(list[str]):
    """A list that keeps the first `MAX_TEXTS` texts, in a printable form, and counts the others."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        super().__init__()
        self.left_out = 0
        self.extend(texts)

    def append(self, text: str) -> None:
        """Keep one more, or count it."""
        if len(self) < MAX_TEXTS:
            super().append(printable(text))
        else:
            self.left_out += 1

    def extend(self, texts: Iterable[str]) -> None:
        """Keep more, or count them."""
        for text in texts:
            self.append(text)

    def __iadd__(self, texts: Iterable[str]) -> Texts:  # type: ignore[override,misc] # as `extend`
        self.extend(texts)
        return self

    @property
    def total(self) -> int:
        """How many there have been."""
        return len(self) + self.left_out

    def told(self) -> tuple[str, ...]:
        """What is kept, and how much was left out."""
        return (*self, f"and {self.left_out} more") if self.left_out else tuple(self)
