"""C3A (arXiv 2407.19342) as PEFT saves it, compiled to Dense.

PEFT adds a matrix of circulant blocks of `block_size`, each with one vector of `c3a_kernel`, over the
number of inputs (peft/tuners/c3a/layer.py, C3ALinear.forward; utils.py, get_circulant_fast, by Fourier
transforms). Written out, output t of a block gets its kernel's element (j - t) mod block_size times input
j.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch

from polygraft.adapters.files.numbers import is_rank
from polygraft.adapters.files.patterns import Form, OptionByModule
from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.targets import BAD_PATTERN, target_modules
from polygraft.adapters.peft.trained_biases import take_trained_biases
from polygraft.core.adapter_weights import AdapterWeights, by_module
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


def compile_c3a(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a C3A folder; yields between modules. Problems are noted in the reader."""
    size: Any = reader.option("block_size", int, 256)
    sizes = OptionByModule(reader.option("block_size_pattern", dict, {}), Form.ENDING, reader.matching)
    reader.ignore("init_weights")
    changes: dict[str, Dense] = {}
    modules = target_modules(reader, base)
    biases, norms = take_trained_biases(reader, base, modules)
    for module in modules:
        yield
        shape = base.linears[module]
        try:
            own = sizes.of(module, size)
        except BAD_PATTERN as error:
            reader.problems.append(
                f"block_size_pattern is not a regular expression that can be matched: {error}"
            )
            break
        if not is_rank(own) or shape.in_features % own or shape.out_features % own:
            reader.problems.append(
                f"block_size {shown(own)} doesn't divide {module}'s {shape.in_features} inputs and "
                f"{shape.out_features} outputs"
            )
            continue
        blocks = (shape.out_features // own, shape.in_features // own, own)
        kernels = reader.take(f"{PREFIX}{module}.c3a_kernel", blocks, wide=True)
        if kernels is not None:
            changes[module] = Circulants(kernels / shape.in_features)
    return AdapterWeights("c3a", reader.parameters, by_module(dense=changes, bias=biases, norm=norms))
