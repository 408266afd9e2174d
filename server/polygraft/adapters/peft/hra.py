"""HRA (arXiv 2405.17484) as PEFT saves it, compiled to LowRank.

PEFT multiplies the base's weight by r Householder reflections, `W (I - 2 u1 u1^T) ... (I - 2 ur ur^T)`, of
unit vectors that with `apply_GS` are made orthogonal first (peft/tuners/hra/layer.py, get_delta_weight).
Their product is I - P U^T with P [in_features, r], so what W gains is `-(W P) U^T`, of rank r; W P is
computed when the base's weights are at hand.
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from polygraft.adapters.files.numbers import is_rank
from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.targets import target_modules
from polygraft.adapters.peft.trained_biases import take_trained_biases
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import LowRank
from polygraft.core.spec import BaseSpec

_LEAST = 1e-3
"""What Gram-Schmidt must leave of a vector, relative to its length: less would be mostly rounding."""


def compile_hra(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile an HRA folder; yields between modules. Problems are noted in the reader."""
    rank = reader.option("r", int, 8)
    orthogonal = reader.option("apply_GS", bool, False)
    reader.ignore("init_weights")
    modules = target_modules(reader, base)
    biases, norms = take_trained_biases(reader, base, modules)
    if not is_rank(rank):
        reader.problems.append(f"rank {shown(rank)} makes no sense")
        modules = []
    low_rank: dict[str, LowRank] = {}
    for module in modules:
        yield
        shape = base.linears[module]
        vectors = reader.take(f"{PREFIX}{module}.hra_u", (shape.in_features, rank), wide=True)
        if vectors is None or not reader.has_room(rank, rank * (shape.in_features + shape.out_features)):
            continue
        yield
        units = _orthonormal(reader, module, vectors) if orthogonal else vectors / vectors.norm(dim=0)
        a = reader.keep(units.t(), module)
        b = reader.keep(-2 * units if orthogonal else -_products(units), module, torch.float32)
        if a is not None and b is not None:
            low_rank[module] = LowRank(a, b, through_base=True)
    return AdapterWeights(
        "hra", reader.parameters, by_module(low_rank=low_rank, bias=biases, norm=norms), of_base="reflection"
    )


def _orthonormal(reader: FolderReader, module: str, vectors: torch.Tensor) -> torch.Tensor:
    """Gram-Schmidt, in PEFT's order of operations; notes vectors of which nothing is left."""
    units: list[torch.Tensor] = []
    for vector in vectors.t():
        rest = vector
        for unit in units:
            rest = rest - (unit @ rest) * unit
        if rest.norm() < _LEAST * vector.norm():
            reader.problems.append(
                f"the vectors of {module} depend on each other, so apply_GS has no meaning"
            )
            break
        units.append(rest / rest.norm())
    return torch.stack(units, dim=1)


def _products(units: torch.Tensor) -> torch.Tensor:
    """P [in_features, r] with I - P U^T the reflections' product: its columns are 2 H u, H those before."""
    products = torch.zeros_like(units)
    for i, unit in enumerate(units.t()):
        products[:, i] = 2 * (unit - products[:, :i] @ (units[:, :i].t() @ unit))
    return products
