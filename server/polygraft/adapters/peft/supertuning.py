"""Super-Tuning as PEFT saves it, compiled to Dense.

PEFT adds `supertuning_values` to the elements of the weight that `supertuning_indices` counts off row by
row, and in the hybrid called Supra (`r` is set) a LoRA beside them (peft/tuners/supertuning/layer.py,
Linear.forward). Without saved indices they are those of the weight's largest elements when training began,
which those of another precision are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polygraft.adapters.files.numbers import is_alpha, is_rank
from polygraft.adapters.files.problems import OptionProblem, require
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.kind import merged_copy
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.adapters.peft.sparse import Sparse
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import Dense
from polygraft.core.spec import BaseSpec


@dataclass(frozen=True, slots=True)
class SparseAndLowRank(Dense):
    """The weight plus numbers for single elements, and plus B A.

    Args:
        a: float32 [rank, in_features]
        b: float32 [out_features, rank], scaling folded in.
    """

    elements: Sparse
    a: torch.Tensor
    b: torch.Tensor

    def fold(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """See `Dense`."""
        return self.elements.fold(weight, first) + self.b[first : first + len(weight)] @ self.a


class SuperTuning(ModuleKind):
    """Numbers for single elements of the weight, and in Supra a LoRA as well."""

    peft_type = "SUPERTUNING"
    title = "Super-Tuning"
    rows = (merged_copy("single elements and, in Supra, a LoRA"),)
    training_only = ("select_top", "lora_dropout", "init_weights")

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._sparsity = reader.option("sparsity", (int, float), 0.99)
        self._rank = reader.option("r", int, None)
        self._alpha = reader.option("lora_alpha", (int, float), 0)
        self._saved = reader.option("save_precomputed_indices", bool, True)

    def begin(self, targets: Sequence[str]) -> None:
        """Check the options."""
        if not self._saved:
            raise OptionProblem(
                "save_precomputed_indices=False isn't served: which elements it changes isn't in the file"
            )
        valid = self._rank is None or (is_rank(self._rank) and is_alpha(self._alpha))
        require(
            valid and 0 <= self._sparsity < 1, sparsity=self._sparsity, r=self._rank, lora_alpha=self._alpha
        )

    def change(self, module: TargetModule) -> ModuleChange:
        """Return the numbers and their places, and the LoRA."""
        rank, size = self._rank, module.inputs * module.outputs
        count = int(size * (1 - self._sparsity))
        lora = []
        if rank is not None:
            lora = [
                ("supertuning_lora_A.weight", (rank, module.inputs)),
                ("supertuning_lora_B.weight", (module.outputs, rank)),
            ]
        values, *factors = module.take_all(("supertuning_values", (count,)), *lora)
        places = module.take_indices("supertuning_indices", (count,), size)
        elements = Sparse.of(values, places // module.inputs, places % module.inputs)
        if not factors:
            return ModuleChange(dense=elements)
        a, b = factors
        return ModuleChange(dense=SparseAndLowRank(elements, a, b * (self._alpha / rank)))
