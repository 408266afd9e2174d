"""Everything that one adapter adds to the base, by primitive.

An adapter lives in three stages, each with a type of its own: a folder on disk (`AdapterFolder`), the
primitives it compiles to (`AdapterWeights`, here), and the registered adapter that requests hold
(`registry.Adapter`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from polygraft.core.primitives import (
    Bottleneck,
    Coupling,
    Dense,
    ExpertLowRank,
    Kron,
    LowRank,
    NormWeights,
    Prefix,
    Rotation,
    Scale,
    SoftPrompt,
    TokenRows,
)
from polygraft.core.tensor_tree import Copies, tensors_of

_OF_LAYERS = (
    "low_rank", "scales", "krons", "rotations", "dense", "biases", "norms", "embedding", "token_rows",
    "bottlenecks", "coupling", "experts", "routers",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Targets:
    """What an adapter's configuration targets.

    Args:
        modules: in the base's order.
        named: modules that `target_modules` names, those included that another option takes out again.
        kept: modules that `exclude_modules` and `layers_to_transform` leave in, named or not; None is all.
        by_pattern: `target_modules` is a regular expression.
    """

    modules: tuple[str, ...] = ()
    named: frozenset[str] = frozenset()
    kept: frozenset[str] | None = None
    by_pattern: bool = False


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What PEFT's combinations read of a LoRA beside its matrices.

    Args:
        rank: the largest that the configuration names.
        rslora: whether it is scaled by the root of its rank.
        scalings: by module, the factor on its B A.
        targets: what the configuration targets.
        embedding: name of the base's, if it is among the modules.
        tied: whether the embedding's matrices are the head's as well.
        has_parameters: whether it has `target_parameters`.
    """

    rank: int
    rslora: bool
    scalings: Mapping[str, float]
    targets: Targets
    embedding: str | None = None
    tied: bool = False
    has_parameters: bool = False


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """Everything that one adapter adds to the base.

    Args:
        kind: PEFT's or AdapterHub's name for the method in lower case.
        low_rank, scales, krons, rotations, dense: by the name of the base's module; one with a `dense` has no
            other, but for a bias.
        biases: [out_features], in the place of a linear module's own, by its name.
        norms: by the name of the module.
        embedding: of the input embedding: a [rank, vocabulary], b [hidden_size, rank].
        token_rows: in their order, a later one's rows before an earlier one's.
        vocabulary: how many tokens it knows, where that isn't what the base knows.
        bottlenecks: by the name of the base's residual site.
        coupling: around all layers.
        experts: by the name of the base's parameter.
        routers: by the name of the module.
        invocation: tokens at whose last occurrence in a prompt it begins to act; empty: from the start.
        of_base: what it makes of the base's own weights, in a word ("reflection"), where its low-rank weights
            are part of that and no summand beside others'; else empty.
        lora: what its linear combinations with others depend on beside the weights, of PEFT's LoRAs alone.
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
    experts: Mapping[str, ExpertLowRank] = field(default_factory=dict)
    routers: Mapping[str, LowRank] = field(default_factory=dict)
    invocation: tuple[int, ...] = ()
    of_base: str = ""
    prefix: Prefix | SoftPrompt | None = None
    lora: LoraSettings | None = None
    warnings: tuple[str, ...] = ()

    @property
    def primitives(self) -> tuple[str, ...]:
        """Names of the primitives it is made of."""
        names = []
        if self.low_rank or self.embedding or self.routers:
            names.append(self.of_base or "low_rank")
        if self.scales or any(primitive.magnitude is not None for primitive in self.low_rank.values()):
            names.append("scale")
        if self.experts:
            names.append("expert_low_rank")
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
        """What of it doesn't fold into weights of the base; empty if all of it does."""
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
        return bool(self.on_modules or self.experts or self.routers) and not self.unmergeable

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
        return bool(self.on_modules or self.experts or self.routers or others or self.replaces)

    @property
    def on_modules(self) -> tuple[str, ...]:
        """Names of the base's linear modules that it has weights for."""
        by_name = (self.low_rank, self.scales, self.krons, self.rotations, self.dense, self.biases)
        return tuple(dict.fromkeys(name for parts in by_name for name in parts))

    @property
    def modules(self) -> int:
        """Modules, sites and experts' parameters of the base that it has weights for."""
        replaced = {*self.norms, *(name for rows in self.token_rows for name in rows.modules)}
        alone = bool(self.coupling) + bool(self.embedding)
        others = {*self.bottlenecks, *self.experts, *self.routers}
        return len({*self.on_modules, *replaced, *others}) + alone

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of its modules and experts' parameters, those that have one."""
        matrices = (primitive.rank for primitive in (*self.low_rank.values(), *self.routers.values()))
        return (*matrices, *(primitive.rank for primitive in self.experts.values()))

    @property
    def rank(self) -> int:
        """The largest rank, 0 without low-rank primitives."""
        return max((*self.ranks, self.embedding.rank if self.embedding else 0))

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
        yield from {id(tensor): tensor for part in parts for tensor in tensors_of(part)}.values()

    def without_layer_weights(self) -> AdapterWeights:
        """The same with shapes alone in what the layers hold the weights of."""
        shapes = Copies(torch.device("meta")).of
        return replace(self, **{name: shapes(getattr(self, name)) for name in _OF_LAYERS})

    @property
    def compiled_bytes(self) -> int:
        """Bytes of memory that its tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors())
