"""What goes in and what comes out, free of protobuf; what the server shares is in `polygraft_types`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from polygraft_types.adapters import AdapterState, Deviation, MergeState, NearestToken
from polygraft_types.answers import ContinuationScore, FinishReason, TokenLogprob, Usage
from polygraft_types.requests import LoraPath


class Health(StrEnum):
    """What the standard health service says about the server or one of its services."""

    UNKNOWN = "UNKNOWN"
    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"
    SERVICE_UNKNOWN = "SERVICE_UNKNOWN"


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds, as the server saw them.

    Args:
        queue: from arrival to first being scheduled.
        prefill: from there to the first token.
        time_to_first_token: from arrival to the first token.
        total: from arrival to the end.
    """

    queue: float
    prefill: float
    time_to_first_token: float
    total: float


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer.

    Args:
        text: without special tokens and stop sequences; begins with the prompt if `echo` was asked for.
        token_ids: empty unless asked for with `return_token_ids`; begins with the prompt's for `echo`.
        seed: the request's own, or the one that the server drew.
        adapter_generation: what served it, of several adapters the first; 0 for the base model.
        stop_sequence: what ended it, for STOP_SEQUENCE; else "".
        stop_token_id: what ended it, for STOP; else None.
        preemptions: how often its place in the cache was taken away and recomputed.
        request_id: the id under which the server's log knows it.
        logprobs: of the tokens, if asked for; begins with the prompt's for `echo`.
        adapter_generations: of all its adapters, in the request's order.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    seed: int
    adapter_generation: int
    lora_path: LoraPath
    stop_sequence: str
    stop_token_id: int | None
    preemptions: int
    request_id: str
    logprobs: tuple[TokenLogprob, ...] = ()
    adapter_generations: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer: whole characters only, so `text` may lag behind `token_ids`.

    `token_ids` and `logprobs` are empty unless asked for; `generation` is set on the last chunk only.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    generation: Generation | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Score:
    """How likely the model finds the continuations of a prompt.

    Args:
        continuations: in the order in which they were given.
        usage: of all of them together; `completion_tokens` are theirs.
        adapter_generation: what served it, of several adapters the first; 0 for the base model.
        adapter_generations: of all its adapters, in the request's order.
    """

    continuations: tuple[ContinuationScore, ...]
    usage: Usage
    timings: Timings
    adapter_generation: int
    lora_path: LoraPath
    request_id: str
    adapter_generations: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What unset sampling arguments mean on a server; None is not told."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """The base model as it is served.

    Args:
        model: as given to `polygraft serve --model`.
        context_length: most tokens (virtual, prompt and generated) of one request.
        weight_bytes: the base's weights as loaded.
        max_num_seqs: most requests that run at once.
        max_num_batched_tokens: most rows in one step.
        notes: what a user of this model should know.
    """

    model: str
    architecture: str
    dtype: str
    quantization: str
    device: str
    context_length: int
    vocabulary_size: int
    parameters: int
    weight_bytes: int
    kv_cache_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int
    eos_token_ids: tuple[int, ...]
    default_sampling: SamplingDefaults
    has_chat_template: bool
    server_version: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MergedCopy:
    """A copy of the base's weights with one adapter folded in.

    Args:
        pinned: kept until `adapters.update` says otherwise.
        memory_bytes: that it takes.
        dtype: what its weights are kept in.
        merge_seconds: from being asked for to being there.
        problem: why it failed.
        deviation: None until the server has had time to measure it.
    """

    state: MergeState
    pinned: bool
    memory_bytes: int
    dtype: str
    merge_seconds: float
    problem: str
    deviation: Deviation | None


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter of the registry.

    Args:
        generation: grows with every load of any adapter; 0 for one that never loaded.
        kind: PEFT's name for the method in lower case, such as "lora" or "prefix_tuning".
        primitives: what it was compiled to, such as "low_rank".
        modules: modules of the base that it touches.
        rank: the largest, for low-rank kinds.
        source: folder relative to the server's store.
        content_hash: SHA-256 over configuration and weights, in hexadecimal.
        running_requests: requests that hold it now.
        load_time: when it became ready (UTC), or None.
        load_seconds: what loading took.
        problems: why it failed.
        warnings: it works, but.
        mergeable: whether requests may ask for the merged path.
        merged_only: whether they can't have the other one.
        own_prompts: whether its requests use a tokenizer or chat template of its own.
        merged: its merged copy, or None if this generation never had one.
        nearest_tokens: for each virtual token of a soft prompt, if asked for, the vocabulary's nearest
            tokens, the nearest first.
    """

    name: str
    generation: int
    state: AdapterState
    kind: str
    primitives: tuple[str, ...]
    modules: int
    rank: int
    virtual_tokens: int
    parameters: int
    disk_bytes: int
    compiled_bytes: int
    source: str
    content_hash: str
    running_requests: int
    load_time: datetime | None
    load_seconds: float
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    mergeable: bool = False
    merged_only: bool = False
    merged: MergedCopy | None = None
    own_prompts: bool = False
    nearest_tokens: tuple[tuple[NearestToken, ...], ...] = ()
