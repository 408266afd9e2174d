"""MiSS (arXiv 2409.15371) as PEFT saves it, compiled to LowRank, or to Dense in one of its variants.

The input is cut into pieces of r, the last one filled up with zeros, and their sum is multiplied by
`miss_block` [r, out] (peft/tuners/miss/layer.py, MissLinear.forward): a LowRank whose A is identity
matrices side by side. With `init_weights="mini"` the file holds the first `mini_r` columns of the block,
which repeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polygraft.adapters.files.numbers import is_rank
from polygraft.adapters.files.problems import OptionProblem, Problem, require
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.files.shown import shown
from polygraft.adapters.kind import merged_copy, side_path
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import Dense
from polygraft.core.spec import BaseSpec


@dataclass(frozen=True, slots=True)
class Squares(Dense):
    """The weight W, cut into squares, plus W B + B for each of them.

    Args:
        blocks: float32 [outputs / size, size, size], one B for all squares of these rows.
    """

    blocks: torch.Tensor

    @property
    def span(self) -> int:
        """See `Dense`."""
        return self.blocks.shape[1]

    def fold(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """See `Dense`."""
        size = self.span
        squares = weight.view(-1, size, weight.shape[1] // size, size)
        own = self.blocks[first // size :][: len(squares)]
        return (squares + torch.einsum("oabi,oij->oabj", squares, own) + own[:, :, None]).view(weight.shape)


class Miss(ModuleKind):
    """One small block for all pieces of the input."""

    peft_type = "MISS"
    title = "MiSS"
    paper = "2409.15371"
    rows = (
        side_path(),
        merged_copy("a small matrix for each square of the weight", where='with `init_weights="bat"`'),
    )
    training_only = ("miss_dropout",)
    trains_biases = True

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._rank = reader.option("r", int, 64)
        self._variant = reader.option("init_weights", (bool, str), True)
        self._width = reader.option("mini_r", int, 1)

    def begin(self, targets: Sequence[str]) -> None:
        """Check the options."""
        if isinstance(self._variant, str) and self._variant not in ("mini", "bat"):
            raise OptionProblem(f"init_weights {shown(self._variant)} isn't one of PEFT's variants")
        valid = is_rank(self._rank) and (self._variant != "mini" or is_rank(self._width))
        require(valid, r=self._rank, mini_r=self._width)

    def change(self, module: TargetModule) -> ModuleChange:
        """Return identity matrices side by side and the block, or the squares' blocks."""
        rank, inputs, outputs = self._rank, module.inputs, module.outputs
        bat = self._variant == "bat"
        columns = self._width if self._variant == "mini" else outputs
        if bat:
            fits = inputs % rank == 0 and outputs % rank == 0
        else:
            fits = rank <= inputs and outputs % columns == 0
        if not fits:
            raise Problem(f"r {rank} with mini_r {self._width} doesn't fit {module.sizes}")
        if bat:
            return ModuleChange(dense=Squares(module.take("miss_block", (outputs // rank, rank, rank))))
        block = module.take("miss_block", (rank, columns))
        module.need_room(rank)
        a = torch.eye(rank).repeat(1, -(-inputs // rank))[:, :inputs]
        return module.low_rank(a, block.repeat(1, outputs // columns).T)
