"""Log-probabilities of the model's own distribution: of its logits before bias, penalties and temperature."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from polygraft.base.tokenizer import TextTokenizer, contained
from polygraft_types.answers import TokenLogprob, TopLogprob

_SLICE = 2**22
"""Values that one softmax takes at a time: 16 MiB of float32."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely a token is behind a row of logits.

    Args:
        logprob: natural logarithm; NaN if the row holds NaN or +inf.
        is_greedy: whether it is the first of the likeliest.
        top: (token id, log-probability) of the likeliest.
    """

    token_id: int
    logprob: float
    is_greedy: bool
    top: tuple[tuple[int, float], ...] = ()


def likelihoods(logits: torch.Tensor, tokens: Sequence[int], top: Sequence[int]) -> list[Likelihood]:
    """How likely each row's token is.

    Args:
        logits: [rows, vocabulary], of any floating-point type; not changed.
        tokens: one for each row.
        top: how many of the likeliest each row wants.
    """
    found: list[Likelihood] = []
    rows = max(1, _SLICE // logits.shape[-1])
    with torch.inference_mode():
        for first in range(0, len(tokens), rows):
            last = first + rows
            found += _slice(logits[first:last], tokens[first:last], top[first:last])
    return found


def _slice(logits: torch.Tensor, tokens: Sequence[int], top: Sequence[int]) -> list[Likelihood]:
    logits = logits.float()
    logprobs = logits.log_softmax(-1)
    wanted = torch.tensor(tokens, device=logits.device)[:, None]
    own = logprobs.gather(-1, wanted)[:, 0].tolist()
    greedy = (logits.argmax(-1) == wanted[:, 0]).tolist()
    most = min(max(top), logits.shape[-1])
    ranked = logprobs.topk(most)
    values, ids = ranked.values.tolist(), ranked.indices.tolist()
    return [
        Likelihood(tokens[at], own[at], greedy[at], tuple(zip(ids[at][: top[at]], values[at], strict=False)))
        for at in range(len(tokens))
    ]


class TokenTexts:
    """Texts of single tokens, for people to read beside their ids."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._backend = tokenizer.backend
        self._texts: dict[int, str] = {}
        # Some decoders drop the space that a text's first token begins with, so another one goes before.
        self._before = tokenizer.encode("a", special=False)[-1:]
        try:
            self._cut = len(self._decode(self._before))
        except ValueError:
            self._before, self._cut = [], 0

    def __call__(self, token: int) -> str:
        """A token's text, special tokens too; U+FFFD for part of a character, or if the tokenizer fails."""
        text = self._texts.get(token)
        if text is None:
            try:
                text = self._decode([*self._before, token])[self._cut :]
            except ValueError:
                text = "\ufffd"
            self._texts[token] = text
        return text

    def _decode(self, ids: list[int]) -> str:
        return contained(lambda: self._backend.decode(ids, skip_special_tokens=False))

    def describe(self, found: Iterable[Likelihood]) -> tuple[TokenLogprob, ...]:
        """Likelihoods with texts."""
        return tuple(
            TokenLogprob(
                one.token_id,
                self(one.token_id),
                one.logprob,
                tuple(TopLogprob(token, self(token), logprob) for token, logprob in one.top),
            )
            for one in found
        )
