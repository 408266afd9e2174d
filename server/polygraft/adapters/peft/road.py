"""RoAd (arXiv 2409.00119) as PEFT saves it, compiled to Dense.

PEFT turns and scales pairs of a module's outputs, its bias included: element i of a group is paired with
the one half a group further, and `y1 = x1 c1 - x2 s1`, `y2 = x2 c2 + x1 s2` with c = alpha cos(theta), s =
alpha sin(theta) (peft/tuners/road/layer.py, _prepare_cols and _apply_road). The variants share angles and
scales in a pair (road_1), have them for each output (road_2), or for each output's two factors (road_4).
Folded into the weight, rows are turned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polygraft.adapters.files.numbers import is_rank
from polygraft.adapters.files.problems import Problem, require
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.kind import merged_copy
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import Dense
from polygraft.core.spec import BaseSpec

_NUMBERS = {"road_1": 1, "road_2": 2, "road_4": 4}
"""Angles for each pair of outputs."""


@dataclass(frozen=True, slots=True)
class TurnedPairs(Dense):
    """Pairs of rows, turned and scaled.

    Args:
        own, other: float32 [groups, 2, half], what each output gets of itself and of its partner.
    """

    own: torch.Tensor
    other: torch.Tensor

    @property
    def span(self) -> int:
        """See `Dense`."""
        return 2 * self.own.shape[2]

    def fold(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """See `Dense`."""
        half = self.own.shape[2]
        groups = slice(first // self.span, (first + len(weight)) // self.span)
        rows = weight.view(-1, 2, half, weight.shape[1])
        turned = rows * self.own[groups, ..., None] + rows.flip(1) * self.other[groups, ..., None]
        return turned.view(weight.shape)

    def fold_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """See `Dense`."""
        return None if bias is None else self.fold(bias[:, None], 0)[:, 0]


class RoAd(ModuleKind):
    """Rotations of pairs of outputs."""

    peft_type = "ROAD"
    title = "RoAd"
    paper = "2409.00119"
    rows = (merged_copy("pairs of outputs rotated and scaled"),)
    training_only = ("init_weights",)

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._variant = reader.option("variant", str, "road_1")
        self._size = reader.option("group_size", int, 64)

    def begin(self, targets: Sequence[str]) -> None:
        """Check the options."""
        valid = self._variant in _NUMBERS and is_rank(self._size) and self._size % 2 == 0
        require(valid, variant=self._variant, group_size=self._size)

    def change(self, module: TargetModule) -> ModuleChange:
        """Return the pairs' angles and scales."""
        outputs, size, numbers = module.outputs, self._size, _NUMBERS[self._variant]
        if outputs % size:
            raise Problem(f"group_size {size} doesn't divide {module.name}'s {outputs} outputs")
        count = outputs // 2 * numbers
        angle, scale = module.take_all(("road_theta", (count,)), ("road_alpha", (count,)))
        return ModuleChange(dense=_pairs(angle, scale, numbers, size // 2))


def _pairs(angle: torch.Tensor, scale: torch.Tensor, numbers: int, half: int) -> TurnedPairs:
    """From angles and scales in the variant's order."""
    if numbers == 1:
        cosine = sine = torch.stack([angle.view(-1, half)] * 2, 1)
        first = second = torch.stack([scale.view(-1, half)] * 2, 1)
    else:
        shape = (-1, numbers // 2, 2, half)
        angles, scales = angle.view(shape), scale.view(shape)
        cosine, sine = angles[:, 0], angles[:, -1]
        first, second = scales[:, 0], scales[:, -1]
    sign = torch.tensor([-1.0, 1.0])[:, None]
    return TurnedPairs(first * cosine.cos(), second * sine.sin() * sign)
