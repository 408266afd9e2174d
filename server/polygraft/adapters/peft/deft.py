"""DEFT and PaRa as PEFT saves them, compiled to LowRank.

PEFT takes a subspace out of the base's weight and puts something else in, `W - Q (S^T W) + scaling Q R`
(peft/tuners/deft/layer.py, _project and get_delta_weight): with "relu" Q is P itself and S its positive part,
with "qr" both are an orthonormal basis of P's columns; PaRa (`para`) has no R. So what W gains is
`Q (scaling R - S^T W)`, of rank r, and S^T W is computed when the base's weights are at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polygraft.adapters.files.numbers import is_alpha, is_rank
from polygraft.adapters.files.problems import Problem, require
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.kind import side_path
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.core.adapter_weights import ModuleChange
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


class Deft(ModuleKind):
    """Takes a subspace out of the base's weight and puts something else in."""

    peft_type = "DEFT"
    title = "DEFT, PaRa"
    rows = (side_path("low-rank side path, made with the base's weights at load"),)
    training_only = ("init_scale", "deft_dropout", "fan_in_fan_out", "init_weights")
    trains_biases = True
    of_base = "projection"

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._rank = reader.option("r", int, 8)
        self._alpha = reader.option("alpha", (int, float), None)
        self._method = reader.option("decomposition_method", str, "relu")
        self._removes_only = reader.option("para", bool, False)

    def begin(self, targets: Sequence[str]) -> None:
        """Check the options."""
        valid = is_rank(self._rank) and is_alpha(self._alpha or 0) and self._method in ("relu", "qr")
        require(valid, r=self._rank, alpha=self._alpha, decomposition_method=self._method)

    def change(self, module: TargetModule) -> ModuleChange:
        """Return Q and R, from which S^T W is still to be taken."""
        rank = min(self._rank, module.outputs)
        of_p, of_r = ("deft_P", (module.outputs, rank)), ("deft_R", (rank, module.inputs))
        if self._removes_only:
            p, r = module.take(*of_p), torch.zeros(rank, module.inputs)
        else:
            p, r = module.take_all(of_p, of_r)
        module.need_room(rank)
        q = p if self._method == "relu" else _basis(module.name, p)
        a = module.keep(r * (self._alpha / rank if self._alpha else 1), torch.float32)
        removal = Removal(q.relu() if self._method == "relu" else q)
        return ModuleChange(LowRank(a, module.keep(q), of_base=removal))


def _basis(module: str, p: torch.Tensor) -> torch.Tensor:
    """Return Q of P's QR decomposition. Raises Problem if P's columns depend on each other."""
    q: torch.Tensor
    q, r = torch.linalg.qr(p)
    if (r.diagonal().abs() <= _LEAST * p.norm(dim=0)).any():
        raise Problem(f"the columns of {module}'s deft_P depend on each other, so qr has no meaning")
    return q
