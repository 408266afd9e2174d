"""BOFT (arXiv 2311.06243) as PEFT saves it, compiled to Rotation and Scale.

PEFT computes `s * (W (x R)) + bias`, where R is a product of factors that are block-diagonal up to a
permutation (peft/tuners/boft/layer.py, Linear.forward and get_delta_weight). That of factor i moves half
blocks within 2^i blocks, so R itself is block-diagonal, its blocks 2^(factors - 1) times as large as the
saved ones: it is computed once, at load, and no butterfly is left for a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polygraft.adapters.files.problems import Problem, require
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.kind import side_path
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.adapters.peft.oft import cayley
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import Rotation, Scale
from polygraft.core.spec import BaseSpec

_MOST_FACTORS = 32  # each doubles the blocks


class Boft(ModuleKind):
    """A rotation of the inputs that is a product of butterfly factors, and a scale of the outputs."""

    peft_type = "BOFT"
    title = "BOFT"
    paper = "2311.06243"
    rows = (side_path("inputs rotated in blocks, and scales of outputs", "inputs × block size"),)
    training_only = ("boft_dropout", "init_weights", "fan_in_fan_out")
    trains_biases = True

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._size = reader.option("boft_block_size", int, 4)
        self._number = reader.option("boft_block_num", int, 0)
        self._factors = reader.option("boft_n_butterfly_factor", int, 1)

    def begin(self, targets: Sequence[str]) -> None:
        """Check the options."""
        size, number, factors = self._size, self._number, self._factors
        valid = (number > 0) != (size > 0) and min(number, size) >= 0 and 1 <= factors <= _MOST_FACTORS
        require(valid, boft_block_size=size, boft_block_num=number, boft_n_butterfly_factor=factors)

    def change(self, module: TargetModule) -> ModuleChange:
        """Return the product of the factors, and the scale."""
        inputs, number, factors = module.inputs, self._number, self._factors
        block = self._size or inputs // number
        whole = block * 2 ** (factors - 1)
        if block == 0 or inputs % whole or (number and block * number != inputs):
            raise Problem(f"the {inputs} inputs of {module.name} can't be cut into such blocks")
        if factors > 1 and block % 2:
            raise Problem(f"blocks of {block} inputs of {module.name} have no halves to permute")
        saved, scale = module.take_all(
            ("boft_R", (factors, inputs // block, block, block)), ("boft_s", (module.outputs, 1))
        )
        self.reader.need_room(0, inputs * whole, torch.float32)
        blocks = module.keep(_butterfly(saved), torch.float32)
        return ModuleChange(scale=Scale(output=scale.flatten()), rotation=Rotation(blocks))


def _butterfly(saved: torch.Tensor) -> torch.Tensor:
    """R's blocks [n, whole, whole] of the saved ones [factors, blocks, size, size]."""
    factors, _, size, _ = saved.shape
    several = 2 ** (factors - 1)
    whole = several * size
    orthogonal = cayley(0.5 * (saved - saved.transpose(2, 3)).flatten(0, 1)).view(
        factors, -1, several, size, size
    )
    product = None
    for i, parts in enumerate(orthogonal):
        factor = torch.zeros(len(parts), whole, whole)
        for part in range(several):
            inside = slice(part * size, (part + 1) * size)
            factor[:, inside, inside] = parts[:, part]
        order = _permutation(size, 2**i).repeat(several >> i)
        order += (torch.arange(whole) // (size << i)) * (size << i)
        factor = factor[:, order][:, :, order]
        product = factor if product is None else factor @ product
    assert product is not None
    return product


def _permutation(size: int, blocks: int) -> torch.Tensor:
    """Half blocks of `blocks` neighbours: first the even ones, then the odd (block_butterfly_perm)."""
    if blocks == 1:
        return torch.arange(size)
    halves = torch.arange(size * blocks).view(2 * blocks, size // 2)
    return torch.cat([halves[::2], halves[1::2]]).flatten()
