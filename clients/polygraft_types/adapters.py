"""What is told about adapters."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum, auto


class AdapterState(StrEnum):
    """Where an adapter stands. The values are the contract's names."""

    LOADING = "LOADING"
    READY = "READY"
    FAILED = "FAILED"
    UNLOADING = "UNLOADING"
    UNKNOWN = "UNKNOWN"
    """A newer server's value; only clients see it."""


class MergeState(StrEnum):
    """Where an adapter's merged copy stands. The values are the contract's names."""

    MERGING = "MERGING"
    READY = "READY"
    FAILED = "FAILED"
    EVICTED = "EVICTED"
    UNKNOWN = "UNKNOWN"
    """A newer server's value; only clients see it."""


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far the merged path's logits are from the unmerged path's, on a fixed set of texts.

    Args:
        greedy_agreement: share of the positions at which both have the same likeliest token.
        positions: how many were compared.
    """

    largest: float
    mean: float
    greedy_agreement: float
    positions: int


@dataclass(frozen=True, slots=True)
class MergedInfo:
    """A snapshot of one adapter's merged copy.

    Args:
        pinned: kept until it is unpinned, whoever else needs the memory.
        bytes: of memory; 0 unless READY.
        dtype: what its weights are kept in, such as "bfloat16" or "int8".
        seconds: from being asked for to being there.
        problem: why it failed.
        deviation: measured once for each generation, when the server is idle; None before.
    """

    state: MergeState
    pinned: bool = False
    bytes: int = 0
    dtype: str = ""
    seconds: float = 0.0
    problem: str = ""
    deviation: Deviation | None = None


class MergeOutcome(Enum):
    """How the making of a copy ended, or that one was given up."""

    OK = auto()
    FAILED = auto()
    CANCELLED = auto()
    EVICTED = auto()


@dataclass(frozen=True, slots=True)
class MergeEvent:
    """Something that became of a copy; `seconds` from being asked for to being there, for OK."""

    adapter: str
    kind: str
    outcome: MergeOutcome
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A snapshot of one adapter.

    Args:
        generation: grows with every load of any adapter; 0 for one that never loaded.
        kind: PEFT's or AdapterHub's name for the method in lower case, "" when the folder couldn't be read.
        primitives: what it was compiled to, such as "low_rank".
        rank: the largest, for low-rank kinds.
        source: folder relative to the store.
        content_hash: SHA-256 over configuration and weights, in hexadecimal.
        load_time: seconds since the epoch at which it became ready, 0 before.
        load_seconds: what loading took.
        problems: why it failed; empty unless FAILED.
        warnings: it works, but.
        mergeable: whether its weights fold into the base's.
        merged_only: whether it is served on a merged copy alone.
        own_prompts: whether its requests use a tokenizer or chat template of its own.
        merged: its merged copy, or None if there never was one of this generation.
    """

    name: str
    state: AdapterState
    source: str
    generation: int = 0
    kind: str = ""
    primitives: tuple[str, ...] = ()
    modules: int = 0
    rank: int = 0
    virtual_tokens: int = 0
    parameters: int = 0
    disk_bytes: int = 0
    compiled_bytes: int = 0
    content_hash: str = ""
    running_requests: int = 0
    load_time: float = 0.0
    load_seconds: float = 0.0
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    mergeable: bool = False
    merged_only: bool = False
    merged: MergedInfo | None = None
    own_prompts: bool = False


@dataclass(frozen=True, slots=True)
class NearestToken:
    """A token of the vocabulary near to a virtual token; `similarity` is the cosine, in [-1, 1]."""

    token_id: int
    text: str
    similarity: float
