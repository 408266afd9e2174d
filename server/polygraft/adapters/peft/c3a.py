"""C3A (arXiv 2407.19342) as PEFT saves it, compiled to Dense.

PEFT adds a matrix of circulant blocks of `block_size`, each with one vector of `c3a_kernel`, over the
number of inputs (peft/tuners/c3a/layer.py, C3ALinear.forward; utils.py, get_circulant_fast, by Fourier
transforms). Written out, output t of a block gets its kernel's element (j - t) mod block_size times input
j.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polygraft.adapters.files.numbers import is_rank
from polygraft.adapters.files.patterns import Form
from polygraft.adapters.files.problems import Problem
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.files.shown import shown
from polygraft.adapters.kind import merged_copy
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.adapters.peft.per_module import PatternedOption
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import Dense
from polygraft.core.spec import BaseSpec


@dataclass(frozen=True, slots=True)
class Circulants(Dense):
    """The weight plus circulant blocks.

    Args:
        kernels: float32 [outputs / size, inputs / size, size], over the number of inputs.
    """

    kernels: torch.Tensor

    def fold(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """See `Dense`."""
        blocks, size = self.kernels.shape[1:]
        at = torch.arange(first, first + len(weight), device=weight.device)
        own = self.kernels[at // size]
        turned = (torch.arange(size, device=weight.device) - (at % size)[:, None]) % size
        return weight + own.gather(2, turned[:, None].expand(-1, blocks, -1)).flatten(1)


class C3a(ModuleKind):
    """A matrix of circulant blocks."""

    peft_type = "C3A"
    title = "C3A"
    paper = "2407.19342"
    rows = (merged_copy("circulant blocks"),)
    training_only = ("init_weights",)
    trains_biases = True

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        size = reader.option("block_size", int, 256)
        self._sizes = PatternedOption(reader, "block_size_pattern", Form.ENDING, size)

    def change(self, module: TargetModule) -> ModuleChange:
        """Return the blocks' kernels."""
        size = self._sizes.of(module.name)
        if not is_rank(size) or module.inputs % size or module.outputs % size:
            raise Problem(f"block_size {shown(size)} doesn't divide {module.sizes}")
        kernels = module.take("c3a_kernel", (module.outputs // size, module.inputs // size, size))
        return ModuleChange(dense=Circulants(kernels / module.inputs))
