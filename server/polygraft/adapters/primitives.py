"""What every adapter kind compiles to, and what the engine runs.

An adapter lives in three stages, each with a type of its own: a folder on disk (`AdapterFolder`), the
primitives it compiles to (`CompiledAdapter`, here), and the registered adapter that requests hold
(`registry.Adapter`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True, slots=True)
class LowRank:
    """Adds `(x @ A.T) @ B.T + bias` to a module's output; the scaling is folded into B and bias.

    Args:
        a: [rank, in_features]
        b: [out_features, rank]
        bias: [out_features] or None
        magnitude: [out_features], the norm that each row of the base's weight plus B A is brought to, or None
            (DoRA); it becomes a scale when the base's weights are at hand.
    """

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class Scale:
    """Multiplies what a module of the base reads or gives; a `LowRank` beside it sees the input as it was.

    Args:
        input: [in_features] or None; only for a module that reads its input alone.
        output: [out_features] or None.
        after_bias: whether the output is scaled with the module's bias in it.
    """

    input: torch.Tensor | None = None
    output: torch.Tensor | None = None
    after_bias: bool = False


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values that every layer sees before a request's own.

    Args:
        keys: for each layer [virtual_tokens, kv_heads, head_dim], as they lie in the cache.
        values: likewise, [virtual_tokens, kv_heads, value_dim].
        start: position of the first real token.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    start: int

    @property
    def virtual_tokens(self) -> int:
        """Keys that it adds to the context."""
        return self.keys[0].shape[0]


@dataclass(frozen=True, slots=True)
class SoftPrompt:
    """Embeddings that stand before a request's own, at positions 0 to virtual_tokens - 1.

    The engine runs them through the base once and keeps their keys and values like a `Prefix`.

    Args:
        embeddings: [virtual_tokens, hidden_size], as the base's first layer takes them.
    """

    embeddings: torch.Tensor

    @property
    def virtual_tokens(self) -> int:
        """Positions that it takes."""
        return self.embeddings.shape[0]


@dataclass(frozen=True, slots=True)
class CompiledAdapter:
    """Everything that one adapter adds to the base.

    Args:
        kind: PEFT's name for the method in lower case.
        low_rank, scales: by the name of the base's module.
        parameters: in the file.
        warnings: it works, but.
    """

    kind: str
    parameters: int
    low_rank: Mapping[str, LowRank] = field(default_factory=dict)
    scales: Mapping[str, Scale] = field(default_factory=dict)
    prefix: Prefix | SoftPrompt | None = None
    warnings: tuple[str, ...] = ()

    @property
    def primitives(self) -> tuple[str, ...]:
        """Names of the primitives it is made of."""
        names = []
        if self.low_rank:
            names.append("low_rank")
        if self.scales or any(primitive.magnitude is not None for primitive in self.low_rank.values()):
            names.append("scale")
        if isinstance(self.prefix, Prefix):
            names.append("prefix")
        if isinstance(self.prefix, SoftPrompt):
            names.append("soft_prompt")
        return tuple(names)

    @property
    def mergeable(self) -> bool:
        """Whether all of it folds into the base's weights."""
        return bool(self.low_rank or self.scales) and self.prefix is None

    @property
    def modules(self) -> int:
        """Modules of the base that it has weights for."""
        return len({*self.low_rank, *self.scales})

    @property
    def rank(self) -> int:
        """The largest rank, 0 without low-rank primitives."""
        return max((primitive.rank for primitive in self.low_rank.values()), default=0)

    @property
    def virtual_tokens(self) -> int:
        """Keys that it adds to the context."""
        return self.prefix.virtual_tokens if self.prefix else 0

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor that it keeps in memory."""
        for low_rank in self.low_rank.values():
            yield low_rank.a
            yield low_rank.b
            yield from (t for t in (low_rank.bias, low_rank.magnitude) if t is not None)
        for scale in self.scales.values():
            yield from (t for t in (scale.input, scale.output) if t is not None)
        if isinstance(self.prefix, Prefix):
            yield from self.prefix.keys
            yield from self.prefix.values
        elif self.prefix is not None:
            yield self.prefix.embeddings

    def without_low_rank_weights(self) -> CompiledAdapter:
        """The same with shapes alone in `low_rank` and `scales`, for when the layers hold the weights."""

        def shape(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.to("meta")

        low_rank = {
            name: LowRank(p.a.to("meta"), p.b.to("meta"), shape(p.bias), shape(p.magnitude))
            for name, p in self.low_rank.items()
        }
        scales = {
            name: Scale(shape(s.input), shape(s.output), s.after_bias) for name, s in self.scales.items()
        }
        return replace(self, low_rank=low_rank, scales=scales)

    @property
    def compiled_bytes(self) -> int:
        """Bytes of memory that its tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors())
