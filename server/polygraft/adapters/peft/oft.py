"""OFT (arXiv 2306.07280; the input-centric form of 2506.19847) as PEFT saves it, compiled to Rotation.

PEFT multiplies what a module reads by a block-diagonal matrix (peft/tuners/oft/layer.py,
OFTRotationModule.forward). A block is made from the upper triangle of a skew-symmetric matrix Q, by Cayley's
transform `(I - Q)(I + Q)^-1` or by the first terms of its Neumann series. Here that happens once, at load.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from packaging.version import InvalidVersion, Version

from polygraft.adapters.files.numbers import is_alpha
from polygraft.adapters.files.problems import OptionProblem, require
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.files.shown import shown
from polygraft.adapters.kind import side_path
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import Rotation
from polygraft.core.spec import BaseSpec

_NEUMANN_CHANGED = Version("0.18.0")
_MOST_TERMS = 100


class Oft(ModuleKind):
    """A rotation of the inputs, in blocks."""

    peft_type = "OFT"
    title = "OFT"
    paper = "2306.07280"
    rows = (side_path("inputs rotated in blocks", "inputs × block size"),)
    training_only = ("module_dropout", "init_weights", "fan_in_fan_out")
    trains_biases = True
    rotations_in_order = True

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._number = reader.option("r", int, 0)
        self._size = reader.option("oft_block_size", int, None)
        self._shared = reader.option("block_share", bool, False)
        self._constrained = reader.option("coft", bool, False)
        self._epsilon = reader.option("eps", (int, float), 6e-5)
        self._terms = _neumann_terms(reader)

    def begin(self, targets: Sequence[str]) -> None:
        """Check the options."""
        number, size = self._number, self._size
        if size is None:
            raise OptionProblem(
                "oft_block_size is missing: it was saved before PEFT 0.14, whose weights meant something else"
            )
        require((number > 0) != (size > 0) and min(number, size) >= 0, r=number, oft_block_size=size)
        require(is_alpha(self._epsilon) and self._epsilon >= 0, eps=self._epsilon)

    def change(self, module: TargetModule) -> ModuleChange:
        """Return the blocks, orthogonal or nearly so."""
        inputs = module.inputs
        if self._size:
            block = _nearest_divisor(inputs, self._size)
        else:
            block = inputs // _nearest_divisor(inputs, self._number)
        count = 1 if self._shared else inputs // block
        triangles = module.take("oft_R.weight", (count, block * (block - 1) // 2))
        self.reader.need_room(0, count * block * block, torch.float32)
        skew = _skew_symmetric(triangles, block)
        if self._constrained:
            skew = _shortened(skew, self._epsilon)
        blocks = cayley(skew) if self._terms is None else _neumann(skew, self._terms)
        return ModuleChange(rotation=Rotation(module.keep(blocks, torch.float32)))


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
