"""OSF (arXiv 2504.07097) as PEFT saves it, compiled to LowRank, or to Dense.

PEFT keeps the larger singular values of the base's weight and trains what stands in the place of the others,
`W - U_i S_i V_i + U_low S_low V_low` (peft/tuners/osf/layer.py, get_delta_weight). U_i S_i V_i isn't in the
file: it is made again of the base's weights, as PEFT does when it loads. Singular vectors have no sign of
their own, but their products with each other don't depend on it, nor on which are taken for equal values.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polygraft.adapters.files.numbers import is_alpha
from polygraft.adapters.files.patterns import Form, OptionByModule
from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.targets import BAD_PATTERN, target_modules
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import Dense, LowRank, OfBase
from polygraft.core.spec import BaseSpec


@dataclass(frozen=True, slots=True)
class Replacement(OfBase):
    """Fills in the second half of the ranks: minus the base's smaller singular values, with their vectors."""

    def completed(self, primitive: LowRank, weight: torch.Tensor, bias: torch.Tensor | None) -> LowRank:
        """See `OfBase`."""
        rank = primitive.rank // 2
        left, right = smaller_part(weight, rank)
        a = torch.cat([primitive.a[:rank], right.to(primitive.a)])
        b = torch.cat([primitive.b[:, :rank], -left.to(primitive.b)], 1)
        return LowRank(a.to(primitive.b.dtype), b)


@dataclass(frozen=True, slots=True)
class Replaced(Dense):
    """Replaces so many of the base's singular values that it is no low rank any more.

    Args:
        whole: float32 [out_features, in_features], what stands in their place; completed, what the weight
            gains.
        rank: how many they are; 0 where it is completed.
    """

    whole: torch.Tensor
    rank: int

    @property
    def needs_base(self) -> bool:
        """See `Dense`."""
        return self.rank > 0

    def completed(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Dense:
        """See `Dense`."""
        left, right = smaller_part(weight, self.rank)
        return Replaced(self.whole - left @ right, 0)

    def fold(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """See `Dense`."""
        assert not self.rank, "to be completed with the base's weights first"
        return weight + self.whole[first : first + len(weight)]


def compile_osf(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile an OSF folder; yields between modules. Problems are noted in the reader."""
    kept = reader.option("effective_rank", (int, float), None)
    # PEFT's `re.search` in the module's name.
    ranks = OptionByModule(reader.option("rank_pattern", dict, {}), Form.ANYWHERE, reader.matching)
    # PEFT itself passes over the second.
    reader.ignore("init_weights", "target_svd_config")
    replaced: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in target_modules(reader, base):
        yield
        shape = base.linears[module]
        most = min(shape.in_features, shape.out_features)
        try:
            own = ranks.of(module, kept)
        except BAD_PATTERN as error:
            reader.problems.append(f"rank_pattern is not a regular expression that can be matched: {error}")
            break
        keeps = _keeps(own, most)
        if not keeps:
            reader.problems.append(f"effective_rank {shown(own)} for {module} makes no sense")
            continue
        rank = most - keeps
        name = f"{PREFIX}{module}.osf_svd_params"
        left = reader.take(f"{name}.U_low", (shape.out_features, rank), wide=True)
        values = reader.take(f"{name}.S_low", (rank,), wide=True)
        right = reader.take(f"{name}.V_low", (rank, shape.in_features), wide=True)
        if left is None or values is None or right is None or not rank:
            continue
        scaled = reader.keep(left * values, module, torch.float32)
        if scaled is not None:
            replaced[module] = scaled, right
    full = any(
        2 * left.shape[1] * (len(left) + right.shape[1]) >= len(left) * right.shape[1]
        for left, right in replaced.values()
    )
    low_rank: dict[str, LowRank] = {}
    dense: dict[str, Dense] = {}
    for module, (left, right) in replaced.items():
        yield
        rank, (outputs, inputs) = left.shape[1], (len(left), right.shape[1])
        if full and reader.has_room(0, outputs * inputs, torch.float32):
            dense[module] = Replaced(left @ right, rank)
        elif not full and reader.has_room(2 * rank, 2 * rank * (outputs + inputs)):
            b = reader.keep(nn.functional.pad(left, (0, rank)), module)
            if b is not None:
                a = nn.functional.pad(right, (0, 0, 0, rank))
                low_rank[module] = LowRank(a, b, of_base=Replacement())
    return AdapterWeights("osf", reader.parameters, by_module(low_rank=low_rank, dense=dense))


def _keeps(value: Any, most: int) -> int:
    """How many singular values of a module stay the base's (peft/tuners/osf/model.py, _resolve_rank); 0 for
    what makes no sense."""
    if value is None:
        return most // 2
    if not is_alpha(value):
        return 0
    share = isinstance(value, float) and 0 < value <= 1
    return max(0, min(most, int(most * value if share else value)))


def smaller_part(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of a weight that its smallest singular values make, as a product.

    Computed in float64 from the smaller of the weight's two products with itself, by its eigenvectors.

    Args:
        weight: float32 [out_features, in_features]
        rank: how many, of the smaller of the two.

    Returns:
        float32 [out_features, rank] and [rank, in_features]
    """
    wide = weight.double()
    outputs, inputs = weight.shape
    if inputs <= outputs:
        vectors = torch.linalg.eigh(wide.t() @ wide).eigenvectors[:, :rank]  # ascending
        return (wide @ vectors).float(), vectors.t().float()
    vectors = torch.linalg.eigh(wide @ wide.t()).eigenvectors[:, :rank]
    return vectors.float(), (vectors.t() @ wide).float()
