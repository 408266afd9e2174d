"""OFT (arXiv 2306.07280; the input-centric form of 2506.19847) as PEFT saves it, compiled to Rotation.

PEFT multiplies what a module reads by a block-diagonal matrix (peft/tuners/oft/layer.py,
OFTRotationModule.forward). A block is made from the upper triangle of a skew-symmetric matrix Q, by Cayley's
transform `(I - Q)(I + Q)^-1` or by the first terms of its Neumann series. Here that happens once, at load.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from packaging.version import InvalidVersion, Version

from polygraft.adapters.files.numbers import is_alpha
from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.targets import target_modules
from polygraft.adapters.peft.trained_biases import take_trained_biases
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import Rotation
from polygraft.core.spec import BaseSpec

_TRAINING_ONLY = ("module_dropout", "init_weights", "fan_in_fan_out")
_NEUMANN_CHANGED = Version("0.18.0")
_MOST_TERMS = 100


def compile_oft(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile an OFT folder; yields between modules. Problems are noted in the reader."""
    number, size = reader.option("r", int, 0), reader.option("oft_block_size", int, None)
    shared = reader.option("block_share", bool, False)
    constrained, epsilon = reader.option("coft", bool, False), reader.option("eps", (int, float), 6e-5)
    reader.ignore(*_TRAINING_ONLY)
    terms = _neumann_terms(reader)
    modules = target_modules(reader, base)
    biases, norms = take_trained_biases(reader, base, modules)
    problem = _problem(number, size, epsilon)
    if problem:
        reader.problems.append(problem)
        modules = []
    rotations: dict[str, Rotation] = {}
    for module in modules:
        yield
        inputs = base.linears[module].in_features
        block = _nearest_divisor(inputs, size) if size else inputs // _nearest_divisor(inputs, number)
        count = 1 if shared else inputs // block
        name = f"{PREFIX}{module}.oft_R.weight"
        triangles = reader.take(name, (count, block * (block - 1) // 2), wide=True)
        if triangles is None or not reader.has_room(0, count * block * block, torch.float32):
            continue
        skew = _skew_symmetric(triangles, block)
        if constrained:
            skew = _shortened(skew, epsilon)
        blocks = reader.keep(cayley(skew) if terms is None else _neumann(skew, terms), module, torch.float32)
        if blocks is not None:
            rotations[module] = Rotation(blocks)
    return AdapterWeights(
        "oft",
        reader.parameters,
        by_module(rotation=rotations, bias=biases, norm=norms),
        rotations_in_order=True,
    )


def _problem(number: int, size: int | None, epsilon: float) -> str:
    """What is wrong with the options; empty if nothing is."""
    if size is None:
        return "oft_block_size is missing: it was saved before PEFT 0.14, whose weights meant something else"
    if (number > 0) == (size > 0) or number < 0 or size < 0:
        return f"r {shown(number)} with oft_block_size {shown(size)} makes no sense"
    return "" if is_alpha(epsilon) and epsilon >= 0 else f"eps {shown(epsilon)} makes no sense"


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """Orthogonal matrices [n, size, size] of skew-symmetric ones: `(I - Q)(I + Q)^-1`.

    NaN where numbers are so large that it can't be computed.
    """
    identity = torch.eye(skew.shape[-1]).expand_as(skew)
    turned, failed = torch.linalg.solve_ex(identity + skew, identity - skew, left=False)
    return torch.where(failed[:, None, None] == 0, turned, torch.nan)


def _neumann_terms(reader: FolderReader) -> int | None:
    """Terms of the Neumann series, None for Cayley's transform itself."""
    terms: int = reader.option("num_cayley_neumann_terms", int, 5)
    if not reader.option("use_cayley_neumann", bool, True):
        return None
    if not 1 <= terms <= _MOST_TERMS:
        reader.problems.append(f"num_cayley_neumann_terms {shown(terms)} isn't from 1 to {_MOST_TERMS}")
    try:
        changed = Version(reader.peft_version.partition("@")[0]) < _NEUMANN_CHANGED
    except InvalidVersion:
        changed = True
    if changed:
        reader.problems.append(
            f"use_cayley_neumann means another matrix since PEFT {_NEUMANN_CHANGED}, and peft_version is "
            f"{shown(reader.peft_version)}; train it again with a newer one"
        )
    return max(1, min(terms, _MOST_TERMS))


def _nearest_divisor(inputs: int, wanted: int) -> int:
    """The divisor of a number of inputs that is nearest to what was asked for, of two the lower one."""
    if wanted >= inputs:
        return inputs
    lower = next(divisor for divisor in range(wanted, 0, -1) if inputs % divisor == 0)
    higher = next(divisor for divisor in range(wanted, inputs + 1) if inputs % divisor == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _skew_symmetric(triangles: torch.Tensor, size: int) -> torch.Tensor:
    """[n, size, size] of upper triangles [n, size * (size - 1) / 2] without their diagonals."""
    rows, columns = torch.triu_indices(size, size, 1)
    skew = torch.zeros(len(triangles), size, size)
    skew[:, rows, columns] = triangles
    return skew - skew.transpose(1, 2)


def _shortened(skew: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Constrained OFT: no matrix is longer than epsilon over the root of their number (_project_batch)."""
    most = epsilon / torch.sqrt(torch.tensor(len(skew)))
    norms = torch.linalg.norm(skew, dim=(1, 2), keepdim=True)
    return torch.where(norms <= most, skew, most * (skew / norms))


def _neumann(skew: torch.Tensor, terms: int) -> torch.Tensor:
    """`I + 2 Q + 2 Q^2 + ... + Q^n`; as PEFT counts its terms, 3 and 4 are the same (_cayley_batch)."""
    matrix = torch.eye(skew.shape[-1]).repeat(len(skew), 1, 1)
    if terms > 1:
        matrix += 2 * skew
    if terms > 2:
        power = skew @ skew
        matrix += 2 * power
        for _ in range(terms - 4):
            power = power @ skew
            matrix += 2 * power
        matrix += power @ skew
    return matrix
