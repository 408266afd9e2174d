"""WaveFT (arXiv 2505.12532) as PEFT saves it, compiled to Dense.

PEFT adds the inverse wavelet transform, of one level in two dimensions, of a matrix with `n_frequency`
entries, times `scaling` (peft/tuners/waveft/layer.py, get_delta_weight). Where the entries are isn't saved:
it is drawn again from `random_loc_seed` and the module's shape. With the first Daubechies wavelet, PEFT's
default, each entry is a square of four elements of the weight, so the change stays sparse; without the
transform (`use_idwt=False`) it is a single one.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch

from polygraft.adapters.files.numbers import is_alpha, is_rank
from polygraft.adapters.files.patterns import Form, OptionByModule
from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.projections import KEYS
from polygraft.adapters.peft.sparse import RandomPlaces, Sparse
from polygraft.adapters.peft.targets import BAD_PATTERN, target_modules
from polygraft.adapters.peft.trained_biases import take_trained_biases
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import Dense
from polygraft.core.spec import BaseSpec

_SQUARE = 4


def compile_waveft(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a WaveFT folder; yields between modules. Problems are noted in the reader."""
    scaling = reader.option("scaling", (int, float), 25.0)
    seed = reader.option("random_loc_seed", int, 777)
    family = reader.option("wavelet_family", str, "db1")
    transformed = reader.option("use_idwt", bool, True)
    reader.ignore("fan_in_fan_out", "init_weights")
    modules = target_modules(reader, base)
    biases, norms = take_trained_biases(reader, base, modules)
    counts = _counts(reader, base, modules)
    if transformed and family != "db1":
        reader.problems.append(
            f"wavelet_family {shown(family)} isn't served: its filters are tables that only db1 does without"
        )
    if not is_alpha(scaling) or seed not in KEYS:
        reader.problems.append(f"scaling {shown(scaling)} with random_loc_seed {shown(seed)} makes no sense")
        counts = {}
    places = RandomPlaces(seed)
    changes: dict[str, Dense] = {}
    for module, several in counts.items():
        yield
        shape = base.linears[module]
        if not is_rank(several) or several > shape.in_features * shape.out_features:
            reader.problems.append(f"n_frequency {shown(several)} for {module} makes no sense")
            continue
        values = reader.take(f"{PREFIX}{module}.waveft_spectrum", (several,), wide=True)
        if values is None or not reader.has_room(0, 3 * _SQUARE * several):
            continue
        rows, columns = places.of(several, shape.out_features, shape.in_features)
        values = values * scaling
        if transformed:
            values, rows, columns = _squares(values, rows, columns, shape.out_features, shape.in_features)
        changes[module] = Sparse.of(values, rows, columns)
    return AdapterWeights("waveft", reader.parameters, by_module(dense=changes, bias=biases, norm=norms))


def _counts(reader: FolderReader, base: BaseSpec, modules: Sequence[str]) -> Mapping[str, Any]:
    """How many entries each module has; none after noting what is wrong."""
    count: Any = reader.option("n_frequency", int, 2592)
    counts = OptionByModule(reader.option("n_frequency_pattern", dict, {}), Form.KEY, reader.matching)
    if reader.option("proportional_parameters", bool, False):
        sizes = {name: base.linears[name].in_features * base.linears[name].out_features for name in modules}
        total, budget = sum(sizes.values()), count * len(modules)
        return {name: max(1, round(size / total * budget)) for name, size in sizes.items()}
    try:
        return {name: counts.of(name, count) for name in modules}
    except BAD_PATTERN as error:
        reader.problems.append(
            f"n_frequency_pattern is not a regular expression that can be matched: {error}"
        )
        return {}


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
