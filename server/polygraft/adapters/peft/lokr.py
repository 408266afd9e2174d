"""LoKr (arXiv 2309.14859) as PEFT saves it, compiled to Kron.

PEFT adds `x @ W.T` with W = kron(w1, w2) * alpha / r (peft/tuners/lokr/layer.py, get_delta_weight). The sides
of w1 are a divisor of the module's outputs and one of its inputs (`_divided`); either factor is saved whole,
or as a product of rank r where that is smaller (LoKrLayer.update_layer).
"""

from __future__ import annotations

import math

import torch

from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.kind import side_path
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.adapters.peft.per_module import RankAndAlpha
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import Kron
from polygraft.core.spec import BaseSpec

# `use_effective_conv2d` is for convolutions of more than one position; there are none among linear modules.


class LoKr(ModuleKind):
    """A Kronecker product."""

    peft_type = "LOKR"
    title = "LoKr"
    paper = "2309.14859"
    rows = (side_path("Kronecker side path, two small products", "about as a LoRA of rank 25"),)
    # `use_effective_conv2d` is for convolutions of more than one position; no linear module is one.
    training_only = (
        "rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights", "use_effective_conv2d",
    )  # fmt: skip

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._settings = RankAndAlpha(reader, "alpha")
        self._both = reader.option("decompose_both", bool, False)
        self._factor = reader.option("decompose_factor", int, -1)

    def change(self, module: TargetModule) -> ModuleChange:
        """Return the product's two factors, the scaling folded into the first."""
        rank, alpha = self._settings.of(module.name)
        o1, o2 = _divided(module.outputs, self._factor)
        i1, i2 = _divided(module.inputs, self._factor)
        self.reader.need_room(0, o1 * i1 + o2 * i2, torch.float32)
        w1 = _take_factor(module, "lokr_w1", o1, i1, rank if self._both else None)
        w2 = _take_factor(module, "lokr_w2", o2, i2, rank)
        w1 = module.keep(w1 * (alpha / rank), torch.float32)
        return ModuleChange(kron=Kron(w1, module.keep(w2, torch.float32)))


def _divided(dimension: int, factor: int) -> tuple[int, int]:
    """A number of inputs or outputs as PEFT's product of two (peft/tuners/lokr/layer.py, factorization).

    The first is `factor` if that divides it; else the largest divisor that is neither over `factor`, unless
    that is -1, nor over the square root.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    most = math.isqrt(dimension) if factor == -1 else min(factor, math.isqrt(dimension))
    first = next((divisor for divisor in range(most, 0, -1) if dimension % divisor == 0), 1)
    return first, dimension // first


def _take_factor(module: TargetModule, name: str, rows: int, columns: int, rank: int | None) -> torch.Tensor:
    """Take one factor, float32 [rows, columns].

    Args:
        rank: it is saved as a product if its rank is small enough; None if it is saved whole in any case.
    """
    if rank is None or rank >= max(rows, columns) / 2:
        return module.take(name, (rows, columns))
    a, b = module.take_all((f"{name}_a", (rows, rank)), (f"{name}_b", (rank, columns)))
    return a @ b
