"""Super-Tuning as PEFT saves it, compiled to Dense.

PEFT adds `supertuning_values` to the elements of the weight that `supertuning_indices` counts off row by
row, and in the hybrid called Supra (`r` is set) a LoRA beside them (peft/tuners/supertuning/layer.py,
Linear.forward). Without saved indices they are those of the weight's largest elements when training began,
which those of another precision are not.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch

from polygraft.adapters.files.numbers import is_alpha, is_rank
from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.sparse import Sparse
from polygraft.adapters.peft.targets import target_modules
from polygraft.core.adapter_weights import AdapterWeights, by_module
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


def compile_supertuning(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a Super-Tuning folder; yields between modules. Problems are noted in the reader."""
    sparsity = reader.option("sparsity", (int, float), 0.99)
    rank = reader.option("r", int, None)
    alpha = reader.option("lora_alpha", (int, float), 0)
    saved = reader.option("save_precomputed_indices", bool, True)
    reader.ignore("select_top", "lora_dropout", "init_weights")
    modules = target_modules(reader, base)
    if not saved:
        reader.problems.append(
            "save_precomputed_indices=False isn't served: which elements it changes isn't in the file"
        )
    if not 0 <= sparsity < 1 or (rank is not None and not (is_rank(rank) and is_alpha(alpha))):
        reader.problems.append(
            f"sparsity {shown(sparsity)} with r {shown(rank)} and lora_alpha {shown(alpha)} makes no sense"
        )
        modules = []
    changes: dict[str, Dense] = {}
    for module in modules:
        yield
        shape = base.linears[module]
        name = f"{PREFIX}{module}.supertuning_"
        size = shape.in_features * shape.out_features
        count = int(size * (1 - sparsity))
        values = reader.take(f"{name}values", (count,), wide=True)
        places = reader.take_indices(f"{name}indices", (count,), size) if saved else None
        a = b = None
        if rank is not None:
            a = reader.take(f"{name}lora_A.weight", (rank, shape.in_features), wide=True)
            b = reader.take(f"{name}lora_B.weight", (shape.out_features, rank), wide=True)
        if values is None or places is None or (rank is not None and (a is None or b is None)):
            continue
        elements = Sparse.of(values, places // shape.in_features, places % shape.in_features)
        changes[module] = elements
        if rank is not None and a is not None and b is not None:
            changes[module] = SparseAndLowRank(elements, a, b * (alpha / rank))
    return AdapterWeights("supertuning", reader.parameters, by_module(dense=changes))
