"""What every adapter kind compiles to, and what the engine runs.

An adapter lives in three stages, each with a type of its own: a folder on disk (`AdapterFolder`), the
primitives it compiles to (`CompiledAdapter`, here), and the registered adapter that requests hold
(`registry.Adapter`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, cast

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
        through_base: b is [in_features, rank] and stands for W b, W being the base's weight (HRA); likewise.
    """

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    through_base: bool = False

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class Scale:
    """Multiplies what a module of the base reads or gives; a `LowRank` beside it sees the input as it was.

    Args:
        input: [in_features] or None.
        output: [out_features] or None.
        after_bias: whether the output is scaled with the module's bias in it.
    """

    input: torch.Tensor | None = None
    output: torch.Tensor | None = None
    after_bias: bool = False


class Dense(ABC):
    """Changes a module's weight exactly, but not by a low rank: it is folded into merged copies of the base
    and never runs beside the base's own weights.

    Kinds derive dataclasses from it whose tensors are about what the file holds; the changed weight is
    computed a few rows at a time while a copy is made.
    """

    __slots__ = ()

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
    """Adds `x @ kron(w1, w2).T` to a module's output, never multiplied out; the scaling is folded into w1.

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
class Bottleneck:
    """Adapter tuning (arXiv 1902.00751) where a layer adds a part's output h to the residual stream r.

    With `A(x) = up act(down x + down_bias) + up_bias`, the stream behind the site becomes
    `residual * r + h + A(x)`, or with `norm_after` `residual * r + norm(A(x) + inside) + outside`.

    Args:
        down: [width, hidden_size]
        up: [hidden_size, width], scaling folded in.
        activation: one of `layers.activations.ACTIVATIONS`.
        reads: x: "sum" is r + h, "output" h, "residual" r.
        down_bias: [width] or None.
        up_bias: [hidden_size] or None, scaling folded in.
        normalizes: x is brought to mean 0 and variance 1 first, with `LAYER_NORM_EPSILON`; the norm's own
            weight and bias are folded into `down` and `down_bias`.
        residual: how often r is in the stream afterwards: 1, or 0 or 2 in unusual configurations.
        norm_after: what the result goes through, or None.
    """

    down: torch.Tensor
    up: torch.Tensor
    activation: str
    reads: Literal["sum", "output", "residual"]
    down_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    normalizes: bool = False
    residual: float = 1.0
    norm_after: NormAfter | None = None

    @property
    def width(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]


LAYER_NORM_EPSILON = 1e-5  # torch's default, which AdapterHub leaves as it is


@dataclass(frozen=True, slots=True)
class NormAfter:
    """A layer norm behind a `Bottleneck`.

    Args:
        weight, bias: [hidden_size]
        skip: what is added to the bottleneck's result: h ("output") or r + h ("sum").
        inside: whether it is added before the norm.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    skip: Literal["output", "sum"]
    inside: bool


@dataclass(frozen=True, slots=True)
class Coupling:
    """An invertible adapter (arXiv 2005.00052): NICE's additive coupling behind the embeddings, inverted
    before the head. Each half is changed by `F(x) = up act(down x + down_bias) + up_bias` of the other.

    Forwards `a += F(b); b += G(a)` for the halves a, b of the hidden state; backwards `b -= G(a); a -= F(b)`.

    Args:
        f, g: their layers.
        activation: one of `layers.activations.ACTIVATIONS`.
        inverted: whether it is; some models only have the coupling behind the embeddings.
    """

    f: CouplingLayers
    g: CouplingLayers
    activation: str
    inverted: bool = True


@dataclass(frozen=True, slots=True)
class CouplingLayers:
    """One half's function.

    Args:
        down: [width, hidden_size / 2]
        down_bias: [width]
        up: [hidden_size / 2, width]
        up_bias: [hidden_size / 2]
    """

    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor


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
class CompiledAdapter:
    """Everything that one adapter adds to the base.

    Args:
        kind: PEFT's or AdapterHub's name for the method in lower case.
        low_rank, scales, krons, rotations, dense: by the name of the base's module; one with a `dense` has no
            other.
        biases: [out_features], in the place of a linear module's own, by its name.
        norms: by the name of the module.
        embedding: of the input embedding: a [rank, vocabulary], b [hidden_size, rank].
        token_rows: in their order, a later one's rows before an earlier one's.
        vocabulary: how many tokens it knows, where that isn't what the base knows.
        bottlenecks: by the name of the base's residual site.
        coupling: around all layers.
        invocation: tokens at whose last occurrence in a prompt it begins to act; empty: from the start.
        reflects: its low-rank weights are what reflections take from the base's (HRA), so they are no summand
            beside others'.
        parameters: in the file.
        warnings: it works, but.
    """

    kind: str
    parameters: int
    low_rank: Mapping[str, LowRank] = field(default_factory=dict)
    scales: Mapping[str, Scale] = field(default_factory=dict)
    krons: Mapping[str, Kron] = field(default_factory=dict)
    rotations: Mapping[str, Rotation] = field(default_factory=dict)
    dense: Mapping[str, Dense] = field(default_factory=dict)
    biases: Mapping[str, torch.Tensor] = field(default_factory=dict)
    norms: Mapping[str, NormWeights] = field(default_factory=dict)
    embedding: LowRank | None = None
    token_rows: tuple[TokenRows, ...] = ()
    vocabulary: int | None = None
    bottlenecks: Mapping[str, Bottleneck] = field(default_factory=dict)
    coupling: Coupling | None = None
    invocation: tuple[int, ...] = ()
    reflects: bool = False
    prefix: Prefix | SoftPrompt | None = None
    warnings: tuple[str, ...] = ()

    @property
    def primitives(self) -> tuple[str, ...]:
        """Names of the primitives it is made of."""
        names = []
        if self.low_rank or self.embedding:
            names.append("reflection" if self.reflects else "low_rank")
        if self.scales or any(primitive.magnitude is not None for primitive in self.low_rank.values()):
            names.append("scale")
        if self.krons:
            names.append("kron")
        if self.rotations:
            names.append("rotation")
        if self.dense:
            names.append("dense")
        if self.replaces:
            names.append("replace")
        if self.bottlenecks:
            names.append("bottleneck")
        if self.coupling:
            names.append("coupling")
        if isinstance(self.prefix, Prefix):
            names.append("prefix")
        if isinstance(self.prefix, SoftPrompt):
            names.append("soft_prompt")
        return tuple(names)

    @property
    def unmergeable(self) -> str:
        """What of it doesn't fold into the base's linear modules; empty if all of it does."""
        beside = {
            "virtual tokens": self.prefix,
            "bottlenecks": self.bottlenecks,
            "an invertible adapter": self.coupling,
            "a beginning inside the prompt": self.invocation,
            "norms of its own": self.norms,
            "tokens of its own": self.token_rows,
            "low-rank weights on the embedding": self.embedding,
        }
        return " and ".join(what for what, part in beside.items() if part)

    @property
    def mergeable(self) -> bool:
        """Whether all of it folds into the base's weights."""
        return bool(self.on_modules) and not self.unmergeable

    @property
    def merged_only(self) -> bool:
        """Whether it can't be served but on a merged copy."""
        return bool(self.dense)

    @property
    def replaces(self) -> bool:
        """Whether it has anything in the place of the base's own."""
        return bool(self.biases or self.norms or self.token_rows or self.vocabulary is not None)

    @property
    def in_bank(self) -> bool:
        """Whether it has weights that layers run, or that are folded into theirs."""
        others = self.bottlenecks or self.coupling or self.embedding
        return bool(self.on_modules or others or self.replaces)

    @property
    def on_modules(self) -> tuple[str, ...]:
        """Names of the base's linear modules that it has weights for."""
        by_name = (self.low_rank, self.scales, self.krons, self.rotations, self.dense, self.biases)
        return tuple(dict.fromkeys(name for parts in by_name for name in parts))

    @property
    def modules(self) -> int:
        """Modules and sites of the base that it has weights for."""
        replaced = {*self.norms, *(name for rows in self.token_rows for name in rows.modules)}
        alone = bool(self.coupling) + bool(self.embedding)
        return len({*self.on_modules, *replaced, *self.bottlenecks}) + alone

    @property
    def rank(self) -> int:
        """The largest rank, 0 without low-rank primitives."""
        of_embedding = [self.embedding] if self.embedding else []
        return max((primitive.rank for primitive in (*self.low_rank.values(), *of_embedding)), default=0)

    @property
    def width(self) -> int:
        """The largest width of a bottleneck, 0 without one."""
        return max((primitive.width for primitive in self.bottlenecks.values()), default=0)

    @property
    def virtual_tokens(self) -> int:
        """Keys that it adds to the context."""
        return self.prefix.virtual_tokens if self.prefix else 0

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor that it keeps in memory, one that modules share once."""
        parts = (*(getattr(self, name) for name in _OF_LAYERS), self.prefix)
        yield from {id(tensor): tensor for part in parts for tensor in _tensors(part)}.values()

    def without_layer_weights(self) -> CompiledAdapter:
        """The same with shapes alone in what the layers hold the weights of."""
        shapes = Copies(torch.device("meta")).of
        return replace(self, **{name: shapes(getattr(self, name)) for name in _OF_LAYERS})

    @property
    def compiled_bytes(self) -> int:
        """Bytes of memory that its tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors())


_OF_LAYERS = (
    "low_rank", "scales", "krons", "rotations", "dense", "biases", "norms", "embedding", "token_rows",
    "bottlenecks", "coupling",
)  # fmt: skip
Part = TypeVar("Part")


def _tensors(part: Any) -> Iterator[torch.Tensor]:
    """All tensors of a primitive, of a part of one, or of several."""
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, tuple):
        for item in part:
            yield from _tensors(item)
    elif isinstance(part, Mapping):
        for item in part.values():
            yield from _tensors(item)
    elif hasattr(part, "__dataclass_fields__"):
        for item in fields(part):
            yield from _tensors(getattr(part, item.name))


def shapes_of(part: Part) -> Part:
    """A primitive with its tensors' shapes alone."""
    return Copies(torch.device("meta")).of(part)


class Copies:
    """Copies of primitives with their tensors on a device; a tensor that several share is copied once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # By the first tensor's id, and with it, so that no other gets that id.
        self._copied: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, part: Part) -> Part:
        """The copy of a primitive, of a part of one, or of several."""
        whole: Any = part
        if isinstance(part, torch.Tensor):
            if id(part) not in self._copied:
                self._copied[id(part)] = part, part.to(self._device, copy=True)
            return cast("Part", self._copied[id(part)][1])
        if isinstance(whole, tuple):
            return cast("Part", tuple(map(self.of, whole)))
        if isinstance(whole, Mapping):
            return cast("Part", {name: self.of(item) for name, item in whole.items()})
        if not hasattr(part, "__dataclass_fields__"):
            return part
        copies = {item.name: self.of(getattr(whole, item.name)) for item in fields(whole)}
        return cast("Part", replace(whole, **copies))
