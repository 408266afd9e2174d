"""GraLoRA (arXiv 2505.20355) as PEFT saves it, compiled to LowRank.

The weight is cut into k x k blocks, and each gets a product of rank r / k of its own. PEFT keeps the
factors of a column of blocks together, `gralora_A[n]`, and those of a row of blocks, `gralora_B[j]`; of the
r products that column n has, the j-th r / k go to row j (peft/tuners/gralora/layer.py, Linear.forward). All
blocks together are exactly of rank k r, and that is what it costs. A hybrid adds a plain LoRA of rank
`hybrid_r`. Scaling is alpha / (r + hybrid_r).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polygraft.adapters.files.numbers import is_alpha, is_rank
from polygraft.adapters.files.problems import Problem, require
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.kind import side_path
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.spec import BaseSpec


class GraLora(ModuleKind):
    """A low-rank product for each block of the weight."""

    peft_type = "GRALORA"
    title = "GraLoRA"
    paper = "2505.20355"
    rows = (side_path("low-rank side path of rank k·r, and of the hybrid's rank", "that rank × rows"),)
    training_only = ("gralora_dropout", "fan_in_fan_out", "init_weights")
    trains_biases = True

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._rank = reader.option("r", int, 32)
        self._hybrid = reader.option("hybrid_r", int, 0)
        self._blocks = reader.option("gralora_k", int, 2)
        self._alpha = reader.option("alpha", (int, float), 64)

    def begin(self, targets: Sequence[str]) -> None:
        """Check the options."""
        rank, blocks = self._rank, self._blocks
        valid = is_rank(rank) and is_rank(blocks) and rank % blocks == 0
        valid = valid and is_alpha(self._alpha) and 0 <= self._hybrid < 2**31
        require(valid, r=rank, gralora_k=blocks, hybrid_r=self._hybrid, alpha=self._alpha)

    def change(self, module: TargetModule) -> ModuleChange:
        """Return one product of all blocks."""
        rank, hybrid, blocks = self._rank, self._hybrid, self._blocks
        if module.inputs % blocks or module.outputs % blocks:
            raise Problem(f"gralora_k {blocks} doesn't divide {module.sizes}")
        inputs, outputs = module.inputs // blocks, module.outputs // blocks
        general = [
            ("gralora_A_general.weight", (hybrid, module.inputs)),
            ("gralora_B_general.weight", (module.outputs, hybrid)),
        ]
        block_a, block_b, *plain = module.take_all(
            ("gralora_A", (blocks, inputs, rank)),
            ("gralora_B", (blocks, rank, outputs)),
            *(general if hybrid else ()),
        )
        module.need_room(blocks * rank + hybrid)
        a, b = _spread(block_a, block_b)
        if plain:
            a, b = torch.cat([a, plain[0]]), torch.cat([b, plain[1]], 1)
        return module.low_rank(a, b, self._alpha / (rank + hybrid))


def _spread(block_a: torch.Tensor, block_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A [k r, in] and B [out, k r] of all blocks, from [k, in / k, r] and [k, r, out / k]."""
    blocks, inputs, rank = block_a.shape
    outputs, part = block_b.shape[2], rank // blocks
    a = block_a.new_zeros(blocks, rank, blocks, inputs)
    b = block_b.new_zeros(blocks, outputs, blocks, rank)
    for column in range(blocks):
        a[column, :, column] = block_a[column].T
        for row in range(blocks):
            # The products of this column that go to this row, and where the row's factors for the column are.
            mine = slice(row * part, (row + 1) * part)
            theirs = slice(column * part, (column + 1) * part)
            b[row, :, column, mine] = block_b[row, theirs].T
    return a.view(blocks * rank, -1), b.view(-1, blocks * rank)
