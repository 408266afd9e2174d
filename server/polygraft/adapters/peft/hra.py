"""HRA (arXiv 2405.17484) as PEFT saves it, compiled to LowRank.

PEFT multiplies the base's weight by r Householder reflections, `W (I - 2 u1 u1^T) ... (I - 2 ur ur^T)`, of
unit vectors that with `apply_GS` are made orthogonal first (peft/tuners/hra/layer.py, get_delta_weight).
Their product is I - P U^T with P [in_features, r], so what W gains is `-(W P) U^T`, of rank r; W P is
computed when the base's weights are at hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polygraft.adapters.files.numbers import is_rank
from polygraft.adapters.files.problems import Problem, require
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.kind import side_path
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import LowRank
from polygraft.core.spec import BaseSpec

_LEAST = 1e-3
"""What Gram-Schmidt must leave of a vector, relative to its length: less would be mostly rounding."""


class Hra(ModuleKind):
    """Reflections of the base's weight."""

    peft_type = "HRA"
    title = "HRA"
    paper = "2405.17484"
    rows = (side_path("low-rank side path, made with the base's weights at load"),)
    training_only = ("init_weights",)
    trains_biases = True
    of_base = "reflection"

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._rank = reader.option("r", int, 8)
        self._orthogonal = reader.option("apply_GS", bool, False)

    def begin(self, targets: Sequence[str]) -> None:
        """Check the rank."""
        require(is_rank(self._rank), r=self._rank)

    def change(self, module: TargetModule) -> ModuleChange:
        """Return W P and U, the first to be multiplied by the base's weight W."""
        vectors = module.take("hra_u", (module.inputs, self._rank))
        module.need_room(self._rank)
        units = _orthonormal(module.name, vectors) if self._orthogonal else vectors / vectors.norm(dim=0)
        a = module.keep(units.t())
        b = module.keep(-2 * units if self._orthogonal else -_products(units), torch.float32)
        return ModuleChange(LowRank(a, b, through_base=True))


def _orthonormal(module: str, vectors: torch.Tensor) -> torch.Tensor:
    """Gram-Schmidt, in PEFT's order of operations. Raises Problem if nothing is left of a vector."""
    units: list[torch.Tensor] = []
    for vector in vectors.t():
        rest = vector
        for unit in units:
            rest = rest - (unit @ rest) * unit
        if rest.norm() < _LEAST * vector.norm():
            raise Problem(f"the vectors of {module} depend on each other, so apply_GS has no meaning")
        units.append(rest / rest.norm())
    return torch.stack(units, dim=1)


def _products(units: torch.Tensor) -> torch.Tensor:
    """P [in_features, r] with I - P U^T the reflections' product: its columns are 2 H u, H those before."""
    products = torch.zeros_like(units)
    for i, unit in enumerate(units.t()):
        products[:, i] = 2 * (unit - products[:, :i] @ (units[:, :i].t() @ unit))
    return products
