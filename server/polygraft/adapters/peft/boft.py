"""BOFT (arXiv 2311.06243) as PEFT saves it, compiled to Rotation and Scale.

PEFT computes `s * (W (x R)) + bias`, where R is a product of factors that are block-diagonal up to a
permutation (peft/tuners/boft/layer.py, Linear.forward and get_delta_weight). That of factor i moves half
blocks within 2^i blocks, so R itself is block-diagonal, its blocks 2^(factors - 1) times as large as the
saved ones: it is computed once, at load, and no butterfly is left for a step.
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.oft import cayley
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.targets import target_modules
from polygraft.adapters.peft.trained_biases import take_trained_biases
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import Rotation, Scale
from polygraft.core.spec import BaseSpec

_TRAINING_ONLY = ("boft_dropout", "init_weights", "fan_in_fan_out")
_MOST_FACTORS = 32  # each doubles the blocks


def compile_boft(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a BOFT folder; yields between modules. Problems are noted in the reader."""
    size, number = reader.option("boft_block_size", int, 4), reader.option("boft_block_num", int, 0)
    factors = reader.option("boft_n_butterfly_factor", int, 1)
    reader.ignore(*_TRAINING_ONLY)
    modules = target_modules(reader, base)
    biases, norms = take_trained_biases(reader, base, modules)
    if (number > 0) == (size > 0) or number < 0 or size < 0 or not 1 <= factors <= _MOST_FACTORS:
        reader.problems.append(
            f"boft_block_size {shown(size)} with boft_block_num {shown(number)} and boft_n_butterfly_factor "
            f"{shown(factors)} makes no sense"
        )
        modules = []
    rotations: dict[str, Rotation] = {}
    scales: dict[str, Scale] = {}
    for module in modules:
        yield
        shape = base.linears[module]
        block = size or shape.in_features // number
        whole = block * 2 ** (factors - 1)
        if block == 0 or shape.in_features % whole or (number and block * number != shape.in_features):
            reader.problems.append(
                f"the {shape.in_features} inputs of {module} can't be cut into such blocks"
            )
            continue
        if factors > 1 and block % 2:
            reader.problems.append(f"blocks of {block} inputs of {module} have no halves to permute")
            continue
        saved = reader.take(
            f"{PREFIX}{module}.boft_R", (factors, shape.in_features // block, block, block), wide=True
        )
        scale = reader.take(f"{PREFIX}{module}.boft_s", (shape.out_features, 1), wide=True)
        if saved is None or scale is None:
            continue
        if not reader.has_room(0, shape.in_features * whole, torch.float32):
            continue
        blocks = reader.keep(_butterfly(saved), module, torch.float32)
        if blocks is not None:
            rotations[module] = Rotation(blocks)
            scales[module] = Scale(output=scale.flatten())
    return AdapterWeights(
        "boft", reader.parameters, by_module(scale=scales, rotation=rotations, bias=biases, norm=norms)
    )


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
