"""WaveFT (arXiv 2505.12532) as PEFT saves it, compiled to Dense.

PEFT adds the inverse wavelet transform, of one level in two dimensions, of a matrix with `n_frequency`
entries, times `scaling` (peft/tuners/waveft/layer.py, get_delta_weight). Where the entries are isn't saved:
it is drawn again from `random_loc_seed` and the module's shape. With the first Daubechies wavelet, PEFT's
default, each entry is a square of four elements of the weight, so the change stays sparse; without the
transform (`use_idwt=False`) it is a single one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from polygraft.adapters.files.numbers import is_alpha, is_rank
from polygraft.adapters.files.patterns import Form
from polygraft.adapters.files.problems import OptionProblem, Problem, require
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.files.shown import shown
from polygraft.adapters.kind import merged_copy
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.adapters.peft.per_module import PatternedOption
from polygraft.adapters.peft.projections import KEYS
from polygraft.adapters.peft.sparse import RandomPlaces, Sparse
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.spec import BaseSpec

_SQUARE = 4


class WaveFt(ModuleKind):
    """A few entries of the weight's wavelet transform."""

    peft_type = "WAVEFT"
    title = "WaveFT"
    paper = "2505.12532"
    rows = (merged_copy("single elements and squares; the first Daubechies wavelet only"),)
    training_only = ("fan_in_fan_out", "init_weights")
    trains_biases = True

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        count = reader.option("n_frequency", int, 2592)
        self._counts = PatternedOption(reader, "n_frequency_pattern", Form.KEY, count)
        self._proportional = reader.option("proportional_parameters", bool, False)
        self._scaling = reader.option("scaling", (int, float), 25.0)
        self._seed = reader.option("random_loc_seed", int, 777)
        self._family = reader.option("wavelet_family", str, "db1")
        self._transformed = reader.option("use_idwt", bool, True)

    def begin(self, targets: Sequence[str]) -> None:
        """Check the options, and share the entries out among the modules."""
        if self._transformed and self._family != "db1":
            raise OptionProblem(
                f"wavelet_family {shown(self._family)} isn't served: its filters are tables that only db1 "
                "does without"
            )
        valid = is_alpha(self._scaling) and self._seed in KEYS
        require(valid, scaling=self._scaling, random_loc_seed=self._seed)
        self._places = RandomPlaces(self._seed)
        self._shares: Mapping[str, Any] = {}
        if self._proportional:
            shapes = {name: self.base.linears[name] for name in targets}
            sizes = {name: shape.in_features * shape.out_features for name, shape in shapes.items()}
            total, budget = sum(sizes.values()), self._counts.default * len(targets)
            self._shares = {name: max(1, round(size / total * budget)) for name, size in sizes.items()}

    def change(self, module: TargetModule) -> ModuleChange:
        """Return the elements that the entries stand for."""
        count = self._shares[module.name] if self._proportional else self._counts.of(module.name)
        if not is_rank(count) or count > module.inputs * module.outputs:
            raise Problem(f"n_frequency {shown(count)} for {module.name} isn't valid")
        values = module.take("waveft_spectrum", (count,)) * self._scaling
        self.reader.need_room(0, 3 * _SQUARE * count)
        rows, columns = self._places.of(count, module.outputs, module.inputs)
        if self._transformed:
            values, rows, columns = _squares(values, rows, columns, module.outputs, module.inputs)
        return ModuleChange(dense=Sparse.of(values, rows, columns))


def _squares(
    values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, outputs: int, inputs: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The elements that entries of the transform stand for.

    The upper left quarter holds means, and the others, of the entries' own signs, differences: the right ones
    between rows, the lower ones between columns.
    """
    height, width = (outputs + 1) // 2, (inputs + 1) // 2
    between_rows, between_columns = columns >= width, rows >= height
    top, left = 2 * (rows % height), 2 * (columns % width)
    parts = []
    for down in (0, 1):
        for right in (0, 1):
            negative = (between_rows & bool(down)) ^ (between_columns & bool(right))
            parts.append((torch.where(negative, -values, values) / 2, top + down, left + right))
    all_values, all_rows, all_columns = (torch.cat(part) for part in zip(*parts, strict=True))
    inside = (all_rows < outputs) & (all_columns < inputs)
    return all_values[inside], all_rows[inside], all_columns[inside]
