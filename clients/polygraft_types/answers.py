"""What the model answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from polygraft_types.requests import LoraPath


class FinishReason(StrEnum):
    """Why a request ended. The values are the contract's names."""

    STOP = "STOP"
    """The model emitted an end-of-sequence token or one of the request's stop token ids."""
    LENGTH = "LENGTH"
    """`max_new_tokens` were generated."""
    STOP_SEQUENCE = "STOP_SEQUENCE"
    """The text reached one of the request's stop sequences."""
    TIME_LIMIT = "TIME_LIMIT"
    """`time_limit` seconds have passed since the request arrived."""
    CANCELLED = "CANCELLED"
    """The caller aborted."""
    SCORED = "SCORED"
    """All continuations have their log-likelihoods; of scores alone, and in metrics alone."""
    UNKNOWN = "UNKNOWN"
    """A newer server's reason, which this version of the client doesn't know."""


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the likeliest tokens at a position."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and how likely the model found it there.

    Args:
        text: the token's own, special tokens spelled out; a part of a character is U+FFFD.
        logprob: natural logarithm; None for a prompt's first token, which nothing predicts.
        top: the likeliest first, as many as were asked for.
    """

    token_id: int
    text: str
    logprob: float | None
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ContinuationScore:
    """How likely the model finds one continuation.

    Args:
        log_likelihood: the sum over its tokens, natural logarithm.
        is_greedy: whether greedy decoding would have produced it.
        tokens: its tokens.
    """

    log_likelihood: float
    is_greedy: bool
    tokens: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted for one request.

    Args:
        prompt_tokens: special tokens included.
        cached_tokens: of these, tokens whose keys and values were already there.
        virtual_tokens: the adapter's; they occupy the context and are computed once for all requests.
        completion_tokens: the one that stopped the request included.
    """

    prompt_tokens: int
    cached_tokens: int
    virtual_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds. `prefill` runs from admission to the first token; all but `total` are None for a
    request that ended before it got there.
    """

    total: float
    queue: float | None = None
    prefill: float | None = None
    time_to_first_token: float | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """How a request ended.

    Args:
        adapter_generations: of the adapters that served it, in the request's order; none for the base model.
        stop_sequence: the stop sequence that ended it, for STOP_SEQUENCE.
        stop_token_id: the token that ended it, for STOP.
        preemptions: how often its blocks were taken away and recomputed.
    """

    reason: FinishReason
    usage: Usage
    timings: Timings
    seed: int
    path: LoraPath
    adapter_generations: tuple[int, ...] = ()
    stop_sequence: str | None = None
    stop_token_id: int | None = None
    preemptions: int = 0
