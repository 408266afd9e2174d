"""The primitives: what every adapter kind compiles to, and all that the engine runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LowRank:
    """Adds `scaling * (x @ A.T) @ B.T + bias` to a module's output.

    The scaling is kept apart, since A and B usually have their file's 16 bits, in which B times a scaling
    that isn't a power of two doesn't fit. Kinds that compute A or B do so in float32; `FolderReader.keep`
    rounds the result once on a bfloat16 base, and not at all on others.

    Args:
        a: [rank, in_features]
        b: [out_features, rank]
        bias: float32 [out_features] or None; the scaling is in it.
        magnitude: [out_features], the norm that each row of the base's weight plus B A is brought to, or None
            (DoRA); it becomes a scale when the base's weights are at hand.
        through_base: b is [in_features, rank] and stands for W b, W being the base's weight (HRA); likewise.
        of_base: what completes it when the base's weights are at hand, or None; likewise.
        scaling: must be finite in float32.
    """

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    through_base: bool = False
    of_base: OfBase | None = None
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.a.shape[0]

    @property
    def product(self) -> torch.Tensor:
        """What the module's weight gains, float32 [out_features, in_features]."""
        return self.scaling * (self.b.float() @ self.a.float())

    @property
    def needs_base(self) -> bool:
        """Whether it runs only when the base's weights have made it what it is."""
        return self.through_base or self.magnitude is not None or self.of_base is not None


class OfBase(ABC):
    """What the base's own weight has to do with a `LowRank`, which is completed once, at load.

    Kinds derive dataclasses from it whose tensors are what the file holds.
    """

    __slots__ = ()

    @abstractmethod
    def completed(self, primitive: LowRank, weight: torch.Tensor, bias: torch.Tensor | None) -> LowRank:
        """What runs, which needs the base no more; a in the type of b.

        Args:
            primitive: the `LowRank` that has this.
            weight: the module's own as it is served, float32 [out_features, in_features].
            bias: likewise, float32 [out_features] or None.
        """


@dataclass(frozen=True, slots=True)
class ExpertLowRank:
    """Adds `scaling * (x @ a[e].T) @ b[e].T` to the product of expert e, before what follows it.

    Args:
        a: [experts, rank, in_features]
        b: [experts, out_features, rank]
        scaling: apart from them, as a `LowRank`'s is.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """Of one expert's product."""
        return self.a.shape[1]


@dataclass(frozen=True, slots=True)
class Scale:
    """Multiplies what a module of the base reads or gives; a `LowRank` beside it sees the input as it was.

    Args:
        input: [in_features] or None.
        output: [out_features] or None.
        after_bias: whether the output is scaled with the module's bias in it.
        of_sum: whether the scale applies to the output plus a `LowRank`'s product, but not to its bias.
    """

    input: torch.Tensor | None = None
    output: torch.Tensor | None = None
    after_bias: bool = False
    of_sum: bool = False


class Dense(ABC):
    """Changes a module's weight exactly, but not by a low rank: it is folded into merged copies of the base
    and never runs beside the base's own weights.

    Kinds derive dataclasses from it whose tensors are about what the file holds; the changed weight is
    computed a few rows at a time while a copy is made.
    """

    __slots__ = ()

    @property
    def needs_base(self) -> bool:
        """Whether it can be folded only when it has been completed with the module's whole weight."""
        return False

    def completed(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Dense:
        """What can be folded.

        Args:
            weight: the module's own as it is served, float32 [out_features, in_features].
            bias: likewise, float32 [out_features] or None.
        """
        return self

    @property
    def span(self) -> int:
        """Rows that are folded together: any piece of the weight is of whole multiples, but for its end."""
        return 1

    @abstractmethod
    def fold(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """A part of the weight with the change in it, float32 [rows, in_features].

        Args:
            weight: the base's own rows from `first` on, float32 [rows, in_features]; may be written to.
        """

    def fold_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The module's bias, float32 [out_features] or None, with the change in it."""
        return bias


@dataclass(frozen=True, slots=True)
class Kron:
    """Adds `x @ kron(w1, w2).T` to a module's output, never multiplied out; the scaling is folded into w1,
    which is float32 on every base.

    Args:
        w1: float32 [o1, i1]
        w2: float32 [o2, i2], with o1 o2 outputs and i1 i2 inputs.
    """

    w1: torch.Tensor
    w2: torch.Tensor


@dataclass(frozen=True, slots=True)
class Rotation:
    """Multiplies what a module of the base reads by a block-diagonal matrix; side paths see x as it was.

    Args:
        blocks: float32 [blocks, size, size], for all inputs; or [1, size, size], the same for each block. A
            block R turns its inputs x into `x @ R`.
    """

    blocks: torch.Tensor


@dataclass(frozen=True, slots=True)
class NormWeights:
    """What a norm multiplies by and adds, in the place of the base's own.

    Args:
        weight: [width] as the module keeps it, or None for the base's.
        bias: [width] or None for the base's, if it has any.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of the embedding, of the head, or of both, in the place of the base's own.

    Once it is resolved against the base's weights, a module has at most one of these, without the rows that
    are the base's own.

    Args:
        modules: names of the embedding and the head, whichever they are for.
        weight: [rows, hidden_size]
        ids: int64 [rows], ascending, the tokens that they stand for; None is all from 0 on.
        copied: the file says that the base had these; those of the base's own tokens must be equal to them.
    """

    modules: tuple[str, ...]
    weight: torch.Tensor
    ids: torch.Tensor | None = None
    copied: bool = False


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values that every layer sees before a request's own.

    Args:
        keys: for each layer [virtual_tokens, kv_heads, head_dim], as they lie in the cache; without rows for
            a layer that has no prefix.
        values: likewise, [virtual_tokens, kv_heads, value_dim].
        start: position of the first real token.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    start: int

    @property
    def virtual_tokens(self) -> int:
        """Keys that it adds to the context."""
        return max(len(keys) for keys in self.keys)

    @property
    def bare_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have no prefix."""
        return tuple(layer for layer, keys in enumerate(self.keys) if not len(keys))


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
class OnTrainedBias(Dense):
    """A change of a weight, with a bias that was trained in the place of the module's own.

    Args:
        bias: [out_features]
    """

    change: Dense
    bias: torch.Tensor

    @property
    def span(self) -> int:
        """See `Dense`."""
        return self.change.span

    def fold(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """See `Dense`."""
        return self.change.fold(weight, first)

    def fold_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """See `Dense`."""
        return self.change.fold_bias(self.bias.float())
