"""Makes untrusted text (files, names, fields of requests) safe for a log, an error or a listing.

A name with a line break could forge a log line, one with terminal codes could hide a line, and one of a
hundred megabytes could fill a message. So whatever is shown goes through here first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

MAX_TEXTS = 50
"""How many texts of a list are kept; the rest is only counted."""
MAX_CHARACTERS = 500
"""Limit of one text."""


def printable(text: str, limit: int = MAX_CHARACTERS) -> str:
    """The text in one line: what can't be printed is escaped, what exceeds `limit` characters is cut off."""
    shown = text[: limit + 1]
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def printable_texts(texts: Collection[str]) -> tuple[str, ...]:
    """The first `MAX_TEXTS` texts, each printable, and a count of the rest."""
    return Texts(texts).told()


class Texts(list[str]):
    """A list that keeps the first `MAX_TEXTS` texts in printable form and counts the rest."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        super().__init__()
        self.left_out = 0
        self.extend(texts)

    def append(self, text: str) -> None:
        """Keep one more text, or count it."""
        if len(self) < MAX_TEXTS:
            super().append(printable(text))
        else:
            self.left_out += 1

    def extend(self, texts: Iterable[str]) -> None:
        """Keep more texts, or count them."""
        for text in texts:
            self.append(text)

    def __iadd__(self, texts: Iterable[str]) -> Texts:  # type: ignore[override,misc] # as `extend`
        self.extend(texts)
        return self

    def with_first(self, text: str) -> Texts:
        """These texts after another one."""
        texts = Texts([text, *self])
        texts.left_out += self.left_out
        return texts

    @property
    def total(self) -> int:
        """How many texts have been added."""
        return len(self) + self.left_out

    def told(self) -> tuple[str, ...]:
        """The kept texts, and a count of the rest."""
        return (*self, f"and {self.left_out} more") if self.left_out else tuple(self)
