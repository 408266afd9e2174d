"""DEFT and PaRa as PEFT saves them, compiled to LowRank.

PEFT takes a subspace out of the base's weight and puts something else in, `W - Q (S^T W) + scaling Q R`
(peft/tuners/deft/layer.py, _project and get_delta_weight): with "relu" Q is P itself and S its positive part,
with "qr" both are an orthonormal basis of P's columns; PaRa (`para`) has no R. So what W gains is
`Q (scaling R - S^T W)`, of rank r, and S^T W is computed when the base's weights are at hand.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch

from polygraft.adapters.files.numbers import is_alpha, is_rank
from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.targets import target_modules
from polygraft.adapters.peft.trained_biases import take_trained_biases
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import LowRank, OfBase
from polygraft.core.spec import BaseSpec

_LEAST = 1e-3
"""What QR must leave of a column of P, relative to its length: less would be mostly rounding."""


@dataclass(frozen=True, slots=True)
class Removal(OfBase):
    """Takes S^T W from a.

    Args:
        s: float32 [out_features, rank]
    """

    s: torch.Tensor

    def completed(self, primitive: LowRank, weight: torch.Tensor, bias: torch.Tensor | None) -> LowRank:
        """See `OfBase`."""
        return LowRank((primitive.a - self.s.t() @ weight).to(primitive.b.dtype), primitive.b)


def compile_deft(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a DEFT folder; yields between modules. Problems are noted in the reader."""
    rank = reader.option("r", int, 8)
    alpha = reader.option("alpha", (int, float), None)
    method = reader.option("decomposition_method", str, "relu")
    removes_only = reader.option("para", bool, False)
    reader.ignore("init_scale", "deft_dropout", "fan_in_fan_out", "init_weights")
    modules = target_modules(reader, base)
    biases, norms = take_trained_biases(reader, base, modules)
    if not is_rank(rank) or not is_alpha(alpha or 0) or method not in ("relu", "qr"):
        reader.problems.append(
            f"rank {shown(rank)} with alpha {shown(alpha)} and decomposition_method {shown(method)} makes no "
            "sense"
        )
        modules = []
    low_rank: dict[str, LowRank] = {}
    for module in modules:
        yield
        shape = base.linears[module]
        own = min(rank, shape.out_features)
        p = reader.take(f"{PREFIX}{module}.deft_P", (shape.out_features, own), wide=True)
        r = torch.zeros(own, shape.in_features) if removes_only else None
        if r is None:
            r = reader.take(f"{PREFIX}{module}.deft_R", (own, shape.in_features), wide=True)
        if p is None or r is None or not reader.has_room(own, own * (shape.in_features + shape.out_features)):
            continue
        yield
        q = p if method == "relu" else _basis(reader, module, p)
        a = reader.keep(r * (alpha / own if alpha else 1), module, torch.float32)
        b = reader.keep(q, module)
        if a is not None and b is not None:
            low_rank[module] = LowRank(a, b, of_base=Removal(q.relu() if method == "relu" else q))
    return AdapterWeights(
        "deft", reader.parameters, by_module(low_rank=low_rank, bias=biases, norm=norms), of_base="projection"
    )


def _basis(reader: FolderReader, module: str, p: torch.Tensor) -> torch.Tensor:
    """Q of P's QR decomposition; notes columns of which nothing is left."""
    q: torch.Tensor
    q, r = torch.linalg.qr(p)
    if (r.diagonal().abs() <= _LEAST * p.norm(dim=0)).any():
        reader.problems.append(f"the columns of {module}'s deft_P depend on each other, so qr has no meaning")
    return q
