"""PVeRA (arXiv 2512.07703) as PEFT saves it, compiled to LowRank.

A VeRA that has learnt a distribution: of the 2 r rows of `pvera_A`, scaled by `pvera_lambda_d`, the first r
give the mean and the others the logarithm of the variance. An answer takes the mean
(peft/tuners/pvera/layer.py, PveraLayer._reparametrize), unless `sample_at_inference` asks for noise of its
own in every forward.
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


class Pvera(ModuleKind):
    """A VeRA that has learnt a distribution, of which it serves the mean."""

    peft_type = "PVERA"
    title = "PVeRA"
    paper = "2512.07703"
    rows = (side_path("low-rank side path, the shared projections multiplied out for each module"),)
    training_only = ("pvera_dropout", "d_initial", "fan_in_fan_out", "init_weights", "generator_seed")
    unserved = ("sample_at_inference",)
    trains_biases = True

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._rank = reader.option("r", int, 256)
        self._projections = SharedProjections(reader, base, ("pvera_A", "pvera_B"))

    def begin(self, targets: Sequence[str]) -> None:
        """Take the shared projections."""
        require(is_rank(self._rank), r=self._rank)
        self._a, self._b = self._projections.take(targets, (2 * self._rank, self._rank))

    def change(self, module: TargetModule) -> ModuleChange:
        """Return the module's part of the projections for the mean, scaled."""
        rank = self._rank
        lambda_b, lambda_d = module.take_all(
            ("pvera_lambda_b", (module.outputs,)), ("pvera_lambda_d", (2 * rank,))
        )
        module.need_room(rank)
        a = lambda_d[:rank, None] * self._a[:rank, : module.inputs]
        return module.low_rank(a, lambda_b[:, None] * self._b[: module.outputs])
