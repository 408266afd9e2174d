"""Turns one request's tokens into text as they come."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from polygraft.base.tokenizer import TextTokenizer, contained
from polygraft.engine.tokenizers.stop_sequences import StopSequences
from polygraft.errors import TokenizerFailed

_CONTEXT = 8
"""Prompt tokens that the decoder sees first: enough for what a tokenizer does at a word's start."""


class TextStream:
    """Incremental text of one request: whole characters only, and nothing of a stop sequence.

    Text that may turn out to be the start of a stop sequence is held back until it is certain.

    Args:
        prompt_ids: what comes before; the first generated token's leading space depends on it.
        stop: stop sequences, none of them empty.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._backend = tokenizer.backend
        self._hidden = tokenizer.hidden
        self._decoder = self._start(prompt_ids[-_CONTEXT:])
        self._stop = StopSequences(stop, tokenizer.hidden.values()) if stop else None

    def _start(self, context: Sequence[int]) -> DecodeStream:
        return DecodeStream(ids=list(context), skip_special_tokens=True)

    @property
    def matched(self) -> str | None:
        """The stop sequence that was reached."""
        return None if self._stop is None else self._stop.matched

    def push(self, token: int, match: bool = True) -> str:
        """Add a token; returns the text that has become certain.

        Args:
            match: whether stop sequences count yet.

        Raises:
            TokenizerFailed: the tokenizer fails on this token.
        """
        new = self._decode(token)
        if self._stop is None:
            return new
        if not match:
            return self._stop.flush() + new
        hidden = self._hidden.get(token)
        return self._stop.push(new) if hidden is None else self._stop.push_hidden(hidden)

    def end(self, token: int) -> str:
        """Return what was held back, when a token that isn't part of the text ends it. The token may complete
        a stop sequence, which is then cut off."""
        hidden = self._hidden.get(token)
        if self._stop is None or hidden is None:
            return self.flush()
        text = self._stop.push_hidden(hidden)
        return text if self.matched is not None else text + self.flush()

    def flush(self) -> str:
        """What was held back, when no more tokens come. An unfinished character stays out."""
        return "" if self._stop is None else self._stop.flush()

    def _decode(self, token: int) -> str:
        try:
            return self._step(token)
        except ValueError:
            # The prompt's last tokens have no stable text, for example because they end inside a character.
            self._decoder = self._start([])
        try:
            return self._step(token)
        except ValueError as error:
            raise TokenizerFailed(f"token {token} has no text: {error}") from None

    def _step(self, token: int) -> str:
        return contained(lambda: self._decoder.step(self._backend, token)) or ""
