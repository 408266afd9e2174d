"""What is asked of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

DEFAULT_MAX_NEW_TOKENS = 256
"""What a request that doesn't say gets, if the context leaves as many."""
GREEDY_BELOW = 1e-6
"""Lower temperatures are greedy: the likeliest token has all the probability, up to ties and rounding."""


class LoraPath(StrEnum):
    """How an adapter's low-rank weights are applied to a request's rows."""

    AUTO = "AUTO"
    UNMERGED = "UNMERGED"
    MERGED = "MERGED"
    UNKNOWN = "UNKNOWN"
    """A newer server's value; only clients see it."""


class CombinationType(StrEnum):
    """What several adapters are together."""

    STACK = "STACK"
    """Each acts in its turn: low-rank weights add up."""
    LINEAR = "LINEAR"
    """One LoRA whose A and B are the weighted sums of theirs (PEFT's combination_type="linear")."""


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One adapter of a request.

    Args:
        weight: factor on what low-rank weights add, in [-100, 100].
        generation: of an adapter that was loaded again; None is the newest.
    """

    name: str
    weight: float = 1.0
    generation: int | None = None


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation; `role` is usually "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, rendered through the model's chat template with a generation prompt."""

    messages: tuple[ChatMessage, ...]


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
