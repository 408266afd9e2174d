"""Names and shapes of a base model, against which adapters are checked and compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A module that low-rank adapters can target. `is_head`: it computes the logits."""

    in_features: int
    out_features: int
    is_head: bool = False
    has_bias: bool = False


@dataclass(frozen=True, slots=True)
class EmbeddingShape:
    """The input embedding.

    Args:
        tied: its weight is the head's as well.
        resizable: nothing else of the base reads token ids, so that it may be given larger ones.
    """

    name: str
    rows: int
    tied: bool
    resizable: bool


@dataclass(frozen=True, slots=True)
class NormShape:
    """A norm that sees every row of a step once, each by itself.

    Args:
        axis: of the rows in what it reads: 1, or 2 behind the heads.
    """

    width: int
    has_bias: bool
    axis: int = 1


@dataclass(frozen=True, slots=True)
class ExpertsShape:
    """A module with the weights of several experts.

    Args:
        experts: how many.
        weights: (in_features, out_features) of an expert by the parameter's name, in the order of the
            module's parameters.
        transposed: a parameter is [experts, in_features, out_features]; else [experts, out_features,
            in_features].
    """

    experts: int
    weights: Mapping[str, tuple[int, int]] = field(hash=False)
    transposed: bool


@dataclass(frozen=True, slots=True)
class RouterShape:
    """Sizes of a router's weight [out_features, in_features]."""

    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class ResidualSite:
    """Where a layer adds h to the residual stream r.

    Args:
        layer: name of the layer, whose input is the first site's r.
        part: name of the module whose output is h.
        first: whether r is the layer's input; else it is the sum at the layer's first site.
    """

    layer: str
    part: str
    first: bool


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """Shape and meaning of one attention layer, as its first call showed them."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scaling: float
    window: int
    softcap: float


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """Names and shapes of a base model.

    Args:
        name: as in its config, such as "HuggingFaceTB/SmolLM2-135M-Instruct"; may be empty.
        architecture: transformers' model type.
        linears: by module name; each sees every row of a step exactly once (the head: every sampled one).
        same_input: names of `linears` in groups that read the same tensor, such as q, k and v.
        others: every other module's name and class name, for telling why it can't be targeted.
        embedding: None if it is no plain table.
        norms: by module name.
        attention: by module name, in the model's order.
        residual: sites of bottleneck adapters by name; none where layers aren't made for them.
        experts: modules with the weights of several experts, by name.
        routers: modules that choose experts by a weight of their own, by name.
        parameters: of the whole model, tied ones counted once.
        folder: where its files are; "" if they are on no disk.
    """

    name: str
    architecture: str
    linears: Mapping[str, LinearShape]
    same_input: tuple[tuple[str, ...], ...]
    others: Mapping[str, str]
    embedding: EmbeddingShape | None
    norms: Mapping[str, NormShape]
    attention: Mapping[str, AttentionSite]
    residual: Mapping[str, ResidualSite]
    experts: Mapping[str, ExpertsShape]
    routers: Mapping[str, RouterShape]
    hidden_size: int
    vocabulary_size: int
    parameters: int
    folder: str = ""

    @property
    def head(self) -> str | None:
        """Name of the module that computes the logits, if adapters can target it."""
        return next((name for name, shape in self.linears.items() if shape.is_head), None)

    @property
    def token_modules(self) -> tuple[str, ...]:
        """The embedding and the head, as far as adapters can have rows of their own for them."""
        embedding = () if self.embedding is None else (self.embedding.name,)
        head = self.head
        return embedding if head is None or self.linears[head].has_bias else (*embedding, head)

    @property
    def tied(self) -> bool:
        """Whether the embedding and the head share their weight."""
        return self.embedding is not None and self.embedding.tied

    def resized(self, vocabulary: int) -> BaseSpec:
        """The same base with an embedding and a head for another number of tokens."""
        return replace(
            self,
            linears={
                name: replace(shape, out_features=vocabulary) if shape.is_head else shape
                for name, shape in self.linears.items()
            },
            embedding=None if self.embedding is None else replace(self.embedding, rows=vocabulary),
            vocabulary_size=vocabulary,
        )
