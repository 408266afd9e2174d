"""Everything that one adapter adds to the base, by primitive.

An adapter lives in three stages, each with a type of its own: a folder on disk (`AdapterFolder`), the
primitives it compiles to (`AdapterWeights`, here), and the registered adapter that requests hold
(`registry.Adapter`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from polygraft.core.primitives import (
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
from polygraft.core.residual_primitives import Bottleneck, Coupling
from polygraft.core.tensor_tree import Copies, tensors_of

_OF_LAYERS = ("modules", "embedding", "token_rows", "bottlenecks", "coupling", "experts")
"""The fields whose tensors the layers hold once the adapter has a slot."""


@dataclass(frozen=True, slots=True)
class ModuleChange:
    """Everything that an adapter changes about one module of the base.

    Args:
        low_rank, scale, kron, rotation: of a linear module; `low_rank` also of a router.
        dense: of a linear module, which then has no other primitive but a bias.
        bias: [out_features], replaces the linear module's own bias.
        norm: of a norm, which has nothing else.
    """

    low_rank: LowRank | None = None
    scale: Scale | None = None
    kron: Kron | None = None
    rotation: Rotation | None = None
    dense: Dense | None = None
    bias: torch.Tensor | None = None
    norm: NormWeights | None = None

    @property
    def parts(self) -> dict[str, Any]:
        """The fields that are set, by name."""
        found = ((item.name, getattr(self, item.name)) for item in fields(self))
        return {name: part for name, part in found if part is not None}

    @property
    def needs_base(self) -> bool:
        """Whether it must be completed with the module's own weight before it can act."""
        return self.makes_weights or (self.low_rank is not None and self.low_rank.magnitude is not None)

    @property
    def makes_weights(self) -> bool:
        """Whether its own weights are computed from the module's, which may come out infinite."""
        low_rank, dense = self.low_rank, self.dense
        return (low_rank is not None and (low_rank.through_base or low_rank.of_base is not None)) or (
            dense is not None and dense.needs_base
        )


def by_module(**parts: Mapping[str, Any]) -> dict[str, ModuleChange]:
    """Return the changes by module, given each field of `ModuleChange` by module."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, changes in parts.items():
        for module, change in changes.items():
            found[module][name] = change
    return {module: ModuleChange(**change) for module, change in found.items()}


def joined(*parts: Mapping[str, ModuleChange]) -> dict[str, ModuleChange]:
    """Return the union of several changes; a field of a module is taken from the last one that sets it."""
    found: dict[str, ModuleChange] = {}
    for part in parts:
        for module, change in part.items():
            before = found.get(module)
            found[module] = change if before is None else replace(before, **change.parts)
    return found


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
        modules: by the name of the base's linear module, router or norm.
        embedding: of the input embedding: a [rank, vocabulary], b [hidden_size, rank].
        token_rows: in their order, a later one's rows before an earlier one's.
        vocabulary: how many tokens it knows, where that isn't what the base knows.
        bottlenecks: by the name of the base's residual site.
        coupling: around all layers.
        experts: by the name of the base's parameter.
        invocation: tokens at whose last occurrence in a prompt it begins to act; empty: from the start.
        of_base: what it makes of the base's own weights, in a word ("reflection"), where its low-rank weights
            are part of that and no summand beside others'; else empty.
        rotations_in_order: several of the kind rotate one after the other, in the order of the request.
        lora: what its linear combinations with others depend on beside the weights, of PEFT's LoRAs alone.
        parameters: in the file.
        warnings: it works, but.
    """

    kind: str
    parameters: int
    modules: Mapping[str, ModuleChange] = field(default_factory=dict)
    embedding: LowRank | None = None
    token_rows: tuple[TokenRows, ...] = ()
    vocabulary: int | None = None
    bottlenecks: Mapping[str, Bottleneck] = field(default_factory=dict)
    coupling: Coupling | None = None
    experts: Mapping[str, ExpertLowRank] = field(default_factory=dict)
    invocation: tuple[int, ...] = ()
    of_base: str = ""
    rotations_in_order: bool = False
    prefix: Prefix | SoftPrompt | None = None
    lora: LoraSettings | None = None
    warnings: tuple[str, ...] = ()

    def each(self, part: str) -> dict[str, Any]:
        """Return one field of `ModuleChange` by module, of those that set it."""
        found = ((module, getattr(change, part)) for module, change in self.modules.items())
        return {module: one for module, one in found if one is not None}

    def has(self, part: str) -> bool:
        """Whether any module sets this field of `ModuleChange`."""
        return any(getattr(change, part) is not None for change in self.modules.values())

    @property
    def primitives(self) -> tuple[str, ...]:
        """Names of the primitives it is made of."""
        low_rank = self.each("low_rank").values()
        found = {
            self.of_base or "low_rank": low_rank or self.embedding,
            "scale": self.has("scale") or any(primitive.magnitude is not None for primitive in low_rank),
            "expert_low_rank": self.experts,
            "kron": self.has("kron"),
            "rotation": self.has("rotation"),
            "dense": self.has("dense"),
            "replace": self.replaces,
            "bottleneck": self.bottlenecks,
            "coupling": self.coupling,
            "prefix": isinstance(self.prefix, Prefix),
            "soft_prompt": isinstance(self.prefix, SoftPrompt),
        }
        return tuple(name for name, part in found.items() if part)

    @property
    def unmergeable(self) -> str:
        """The parts of it that can't be folded into the base's weights; empty if all can."""
        parts = {
            "virtual tokens": self.prefix,
            "bottlenecks": self.bottlenecks,
            "an invertible adapter": self.coupling,
            "a beginning inside the prompt": self.invocation,
            "norms of its own": self.has("norm"),
            "tokens of its own": self.token_rows,
            "low-rank weights on the embedding": self.embedding,
        }
        return " and ".join(name for name, part in parts.items() if part)

    @property
    def mergeable(self) -> bool:
        """Whether all of it can be folded into the base's weights."""
        return bool(self.modules or self.experts) and not self.unmergeable

    @property
    def merged_only(self) -> bool:
        """Whether it can be served only on a merged copy."""
        return self.has("dense")

    @property
    def replaces(self) -> bool:
        """Whether it replaces parts of the base."""
        return bool(self.has("bias") or self.has("norm") or self.token_rows or self.vocabulary is not None)

    @property
    def in_bank(self) -> bool:
        """Whether it has weights that layers run, or that are folded into theirs."""
        others = self.bottlenecks or self.coupling or self.embedding
        return bool(self.modules or self.experts or others or self.replaces)

    @property
    def num_modules(self) -> int:
        """Number of the base's modules, residual sites and experts' parameters that it has weights for."""
        of_tokens = {name for rows in self.token_rows for name in rows.modules}
        alone = bool(self.coupling) + bool(self.embedding)
        return len({*self.modules, *of_tokens, *self.bottlenecks, *self.experts}) + alone

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each module and expert parameter that has one."""
        low_rank = (primitive.rank for primitive in self.each("low_rank").values())
        return (*low_rank, *(primitive.rank for primitive in self.experts.values()))

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
