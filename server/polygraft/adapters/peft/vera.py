"""VeRA (arXiv 2310.11454) as PEFT saves it, compiled to LowRank.

PEFT adds `lambda_b * (lambda_d * (x @ vera_A.T)) @ vera_B.T` (peft/tuners/vera/layer.py, Linear.forward).
The random projections vera_A and vera_B are shared by all modules (`projections.py`).

Compiled, every module has weights of its own: VeRA's small files become as large as a LoRA of their rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from polygraft.adapters.files.numbers import is_rank
from polygraft.adapters.files.problems import require
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.kind import side_path
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.adapters.peft.projections import SharedProjections
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.spec import BaseSpec


class Vera(ModuleKind):
    """Scaled random projections that all modules share."""

    peft_type = "VERA"
    title = "VeRA"
    paper = "2310.11454"
    rows = (side_path("low-rank side path, the shared projections multiplied out for each module"),)
    training_only = ("vera_dropout", "d_initial", "fan_in_fan_out", "init_weights")
    trains_biases = True

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._rank = reader.option("r", int, 256)
        self._projections = SharedProjections(reader, base, ("vera_A", "vera_B"))

    def begin(self, targets: Sequence[str]) -> None:
        """Take the shared projections."""
        require(is_rank(self._rank), r=self._rank)
        self._a, self._b = self._projections.take(targets, (self._rank, self._rank))

    def change(self, module: TargetModule) -> ModuleChange:
        """Return the module's part of the projections, scaled."""
        lambda_b, lambda_d = module.take_all(
            ("vera_lambda_b", (module.outputs,)), ("vera_lambda_d", (self._rank,))
        )
        module.need_room(self._rank)
        a = lambda_d[:, None] * self._a[:, : module.inputs]
        return module.low_rank(a, lambda_b[:, None] * self._b[: module.outputs])
