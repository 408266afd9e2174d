"""SHiRA (arXiv 2406.13175) as PEFT saves it, compiled to Dense.

PEFT adds `shira_weight` to the elements of the weight that `shira_indices` names, as many as a LoRA of rank
r has (peft/tuners/shira/layer.py, get_delta_weight). However the mask was made, its indices are in the
file.
"""

from __future__ import annotations

from collections.abc import Sequence

from polygraft.adapters.files.numbers import is_rank
from polygraft.adapters.files.problems import Problem, all_of, require
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.kind import merged_copy
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.adapters.peft.sparse import Sparse
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.spec import BaseSpec


class ShiRa(ModuleKind):
    """Numbers for single elements of the weight."""

    peft_type = "SHIRA"
    title = "SHiRA"
    paper = "2406.13175"
    rows = (merged_copy("single elements"),)
    training_only = ("mask_type", "random_seed", "fan_in_fan_out", "init_weights")

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._rank = reader.option("r", int, 32)

    def begin(self, targets: Sequence[str]) -> None:
        """Check the rank."""
        require(is_rank(self._rank), r=self._rank)

    def change(self, module: TargetModule) -> ModuleChange:
        """Return the numbers and their places."""
        inputs, outputs = module.inputs, module.outputs
        count = self._rank * (inputs + outputs)
        values, (rows, columns) = all_of(
            lambda: module.take("shira_weight", (count,)),
            lambda: module.take_indices("shira_indices", (2, count), max(inputs, outputs)),
        )
        if int(rows.max()) >= outputs or int(columns.max()) >= inputs:
            name = f"{module.prefix}shira_indices"
            raise Problem(f"tensor {name} holds an index that isn't in [{outputs}, {inputs}]")
        return ModuleChange(dense=Sparse.of(values, rows, columns))
