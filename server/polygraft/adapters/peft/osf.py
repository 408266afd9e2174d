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
from polygraft.adapters.files.patterns import Form
from polygraft.adapters.files.problems import Problem
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.files.shown import shown
from polygraft.adapters.kind import merged_copy, side_path
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.adapters.peft.per_module import PatternedOption
from polygraft.core.adapter_weights import ModuleChange
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


class Osf(ModuleKind):
    """Replaces the base's smaller singular values."""

    peft_type = "OSF"
    title = "OSF"
    paper = "2504.07097"
    rows = (
        side_path("low-rank side path of rank 2r, made with the base's weights at load", "2r × rows"),
        merged_copy("other singular values", where="where rank 2r is no less than the weight"),
    )
    # PEFT itself passes over the second.
    training_only = ("init_weights", "target_svd_config")

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        kept = reader.option("effective_rank", (int, float), None)
        # PEFT's `re.search` in the module's name.
        self._kept = PatternedOption(reader, "rank_pattern", Form.ANYWHERE, kept)
        self._replaced: list[tuple[TargetModule, torch.Tensor, torch.Tensor]] = []

    def change(self, module: TargetModule) -> None:
        """Take a module's new values; whether they run as a side path depends on all modules."""
        most = min(module.inputs, module.outputs)
        kept = self._kept.of(module.name)
        keeps = _keeps(kept, most)
        if not keeps:
            raise Problem(f"effective_rank {shown(kept)} for {module.name} isn't valid")
        rank = most - keeps
        left, values, right = module.take_all(
            ("osf_svd_params.U_low", (module.outputs, rank)),
            ("osf_svd_params.S_low", (rank,)),
            ("osf_svd_params.V_low", (rank, module.inputs)),
        )
        if rank:
            self._replaced.append((module, module.keep(left * values, torch.float32), right))

    def others(self) -> Generator[None, None, dict[str, ModuleChange]]:
        """Return low-rank weights for all modules, or dense changes if one is no larger than they."""
        dense = any(
            2 * left.shape[1] * (module.inputs + module.outputs) >= module.inputs * module.outputs
            for module, left, _ in self._replaced
        )
        changes: dict[str, ModuleChange] = {}
        for module, left, right in self._replaced:
            yield
            rank = left.shape[1]
            with self.reader.noting(module.prefix, inner=True):
                if dense:
                    self.reader.need_room(0, module.outputs * module.inputs, torch.float32)
                    changes[module.name] = ModuleChange(dense=Replaced(left @ right, rank))
                else:
                    module.need_room(2 * rank)
                    b = module.keep(nn.functional.pad(left, (0, rank)))
                    a = nn.functional.pad(right, (0, 0, 0, rank))
                    changes[module.name] = ModuleChange(LowRank(a, b, of_base=Replacement()))
        return changes


def _keeps(value: Any, most: int) -> int:
    """How many singular values of a module stay the base's (peft/tuners/osf/model.py, _resolve_rank); 0 for
    an invalid value."""
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
