"""What goes into the engine and what comes out of it, free of protobuf and of tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from polygraft.errors import PolygraftError

DEFAULT_MAX_NEW_TOKENS = 256
"""What a request that doesn't say gets, if the context leaves as many."""


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


class LoraPath(StrEnum):
    """How an adapter's low-rank weights reach a request's rows."""

    AUTO = "AUTO"
    UNMERGED = "UNMERGED"
    MERGED = "MERGED"


class CombinationType(StrEnum):
    """What several adapters are together."""

    STACK = "STACK"
    """Each acts in its turn: low-rank weights add up."""
    LINEAR = "LINEAR"
    """One LoRA whose A and B are the weighted sums of theirs (PEFT's combination_type="linear")."""


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One adapter, by name.

    Args:
        generation: None means the newest.
        weight: what low-rank weights add is multiplied by it.
    """

    name: str
    generation: int | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, rendered through the model's chat template with a generation prompt."""

    messages: tuple[ChatMessage, ...]


GREEDY_BELOW = 1e-6
"""Lower temperatures are greedy: the likeliest token has all the probability, up to ties and rounding."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is picked.

    Args:
        temperature: below `GREEDY_BELOW` it is greedy, otherwise logits are divided by it. At most 100.
        top_p: keep the smallest set of tokens whose probabilities reach it, (0, 1]; 1 keeps all.
        top_k: keep the k most likely tokens; 0 keeps all.
        min_p: drop tokens less likely than this share of the likeliest one's probability, [0, 1].
        seed: with the position, all that the noise depends on; [0, 2**63).
        repetition_penalty: logits of tokens in the prompt or the answer so far are divided by it where they
            are positive and multiplied where negative, [1e-6, 100]; 1 changes nothing.
        presence_penalty: subtracted from the logits of tokens that have been generated, [-2, 2].
        frequency_penalty: the same, times how often, [-2, 2].
        logit_bias: (token id, addition to its logit).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before the temperature."""
        neutral = self.repetition_penalty == 1.0 and self.presence_penalty == self.frequency_penalty == 0.0
        return bool(self.logit_bias) or not neutral


@dataclass(frozen=True, slots=True)
class StoppingParams:
    """When a request ends.

    Args:
        max_new_tokens: at least 1; None is 256, or what the context leaves if that is less.
        min_new_tokens: end-of-sequence and stop tokens can't be sampled, and stop sequences don't
            count, before this many.
        stop: stop sequences; the text ends before the first one that appears.
        stop_token_ids: ids that end the request beside the model's own end-of-sequence tokens.
        ignore_eos: go on after the model's end-of-sequence tokens.
        time_limit: seconds after arrival, or None.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    time_limit: float | None = None


@dataclass(frozen=True, slots=True)
class ResponseParams:
    """What comes back beside the answer's text and tokens.

    Args:
        logprobs: each token's log-probability.
        top_logprobs: so many of the likeliest tokens at each position, [0, 20]; above 0 implies `logprobs`.
        echo: the prompt comes before the answer, with its log-probabilities if these are asked for.
    """

    logprobs: bool = False
    top_logprobs: int = 0
    echo: bool = False

    @property
    def wants_logprobs(self) -> bool:
        """Whether any are asked for."""
        return self.logprobs or self.top_logprobs > 0


@dataclass(frozen=True, slots=True)
class Request:
    """One generation, with every value settled.

    Args:
        id: unique among the running requests.
        prompt: text (tokenized with the model's special tokens), token ids, or a chat.
        adapters: in the order in which they act; none is the base model.
        combination_type: what they are together.
        path_required: whether `lora_path` must be had; otherwise, where an adapter can't be merged, the
            other path serves.
    """

    id: str
    prompt: str | tuple[int, ...] | Chat
    adapters: tuple[AdapterRef, ...] = ()
    lora_path: LoraPath = LoraPath.UNMERGED
    path_required: bool = False
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stopping: StoppingParams = field(default_factory=StoppingParams)
    response: ResponseParams = field(default_factory=ResponseParams)
    combination_type: CombinationType = CombinationType.STACK


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Continuations of one prompt whose log-likelihoods are wanted.

    Args:
        id: unique among the running requests.
        prompt: as a generation's, but text may be empty.
        continuations: text or token ids, at least one.
        adapters, combination_type: as a generation's.
        lora_path: AUTO is UNMERGED, so that all continuations take the same.
        path_required: as a generation's.
        top_logprobs: so many of the likeliest tokens at each position, [0, 20].
    """

    id: str
    prompt: str | tuple[int, ...] | Chat
    continuations: tuple[str | tuple[int, ...], ...]
    adapters: tuple[AdapterRef, ...] = ()
    lora_path: LoraPath = LoraPath.UNMERGED
    path_required: bool = False
    top_logprobs: int = 0
    combination_type: CombinationType = CombinationType.STACK


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

    `cached_tokens` are prompt tokens whose keys and values were reused; `virtual_tokens` are the
    adapter's, which occupy the context but are never recomputed.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    virtual_tokens: int = 0


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


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step produced for one request.

    `text` is whole characters only and never part of a stop sequence, so it may lag behind `token_ids`;
    `path` is the one they took. Exactly one output of a request has `finished` or `error` set, and it is the
    last.

    Args:
        prompt_ids: the prompt's tokens, on the first output of a request that has it echoed; `text` then
            begins with the prompt's.
        logprobs: of `prompt_ids` and `token_ids`, if asked for.
        scores: a score request's results, on its only output.
    """

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    finished: Finished | None = None
    error: PolygraftError | None = None
    path: LoraPath = LoraPath.UNMERGED
    prompt_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    scores: tuple[ContinuationScore, ...] = ()

    @property
    def terminal(self) -> bool:
        """Whether this is the request's last output."""
        return self.finished is not None or self.error is not None
