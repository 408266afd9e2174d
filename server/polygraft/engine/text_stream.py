"""Turns one request's tokens into text as they come."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_CONTEXT = 8
"""Prompt tokens that the decoder sees first: enough for what a tokenizer does at a word's start."""


class TextStream:
    """Incremental text of one request: whole characters only, and nothing of a stop sequence.

    Text that may turn out to be the start of a stop sequence is held back until it is certain.

    Args:
        prompt_ids: what comes before; the first generated token's leading space depends on it.
        stop: stop sequences, none of them empty.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._decoder = self._start(prompt_ids[-_CONTEXT:])
        self._stop = stop
        self._held = ""
        self.matched: str | None = None
        """The stop sequence that was reached."""

    def _start(self, context: Sequence[int]) -> DecodeStream:
        return DecodeStream(ids=list(context), skip_special_tokens=True)

    def push(self, token: int, match: bool = True) -> str:
        """Add a token; returns the text that has become certain.

        Args:
            match: whether stop sequences count yet.
        """
        try:
            new = self._decoder.step(self._tokenizer, token) or ""
        except Exception:  # noqa: BLE001 - tokenizers raises bare Exception
            # The prompt's last tokens don't decode to a stable start, as when it ends inside a character.
            self._decoder = self._start([])
            new = self._decoder.step(self._tokenizer, token) or ""
        if not self._stop:
            return new
        if not match:
            held, self._held = self._held, ""
            return held + new
        self._held += new
        found = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.matched = min(found, key=lambda pair: pair[0])
            text, self._held = self._held[:at], ""
            return text
        keep = max(_overlap(self._held, stop) for stop in self._stop)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def flush(self) -> str:
        """What was held back, when no more tokens come. An unfinished character stays out."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` starts with, shorter than `stop` itself."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
