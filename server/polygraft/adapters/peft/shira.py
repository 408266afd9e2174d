"""SHiRA (arXiv 2406.13175) as PEFT saves it, compiled to Dense.

PEFT adds `shira_weight` to the elements of the weight that `shira_indices` names, as many as a LoRA of rank
r has (peft/tuners/shira/layer.py, get_delta_weight). However the mask was made, its indices are in the
file.
"""

from __future__ import annotations

from collections.abc import Generator

from polygraft.adapters.files.numbers import is_rank
from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.sparse import Sparse
from polygraft.adapters.peft.targets import target_modules
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import Dense
from polygraft.core.spec import BaseSpec


def compile_shira(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a SHiRA folder; yields between modules. Problems are noted in the reader."""
    rank = reader.option("r", int, 32)
    reader.ignore("mask_type", "random_seed", "fan_in_fan_out", "init_weights")
    modules = target_modules(reader, base)
    if not is_rank(rank):
        reader.problems.append(f"rank {shown(rank)} makes no sense")
        modules = []
    changes: dict[str, Dense] = {}
    for module in modules:
        yield
        shape = base.linears[module]
        count = rank * (shape.in_features + shape.out_features)
        values = reader.take(f"{PREFIX}{module}.shira_weight", (count,), wide=True)
        most = max(shape.in_features, shape.out_features)
        indices = reader.take_indices(f"{PREFIX}{module}.shira_indices", (2, count), most)
        if values is None or indices is None:
            continue
        rows, columns = indices
        if int(rows.max()) >= shape.out_features or int(columns.max()) >= shape.in_features:
            reader.problems.append(
                f"tensor {PREFIX}{module}.shira_indices holds an index that isn't in "
                f"[{shape.out_features}, {shape.in_features}]"
            )
            continue
        changes[module] = Sparse.of(values, rows, columns)
    return AdapterWeights("shira", reader.parameters, by_module(dense=changes))
