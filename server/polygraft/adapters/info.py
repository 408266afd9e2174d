"""What the registry tells about an adapter, free of tensors and of protobuf."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class AdapterState(StrEnum):
    """Where an adapter stands. The values are the contract's names."""

    LOADING = "LOADING"
    READY = "READY"
    FAILED = "FAILED"
    UNLOADING = "UNLOADING"


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A snapshot of one adapter.

    Args:
        generation: grows with every load of any adapter; 0 for one that never loaded.
        kind: PEFT's name for the method in lower case, "" when the folder couldn't be read.
        primitives: what it was compiled to, such as "low_rank".
        rank: the largest, for low-rank kinds.
        source: folder relative to the store.
        content_hash: SHA-256 over configuration and weights, in hexadecimal.
        load_time: seconds since the epoch at which it became ready, 0 before.
        load_seconds: what loading took.
        problems: why it failed; empty unless FAILED.
        warnings: it works, but.
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


@dataclass(frozen=True, slots=True)
class NearToken:
    """A token of the vocabulary near to a virtual token; `similarity` is the cosine, in [-1, 1]."""

    token_id: int
    text: str
    similarity: float
