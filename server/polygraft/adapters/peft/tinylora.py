"""TinyLoRA (arXiv 2602.04118) as PEFT saves it, compiled to LowRank.

PEFT adds `B R A` with A and B from the singular values of the base's weight, which are saved with the
adapter, and `R = sum_i v_i P_i` of fixed random matrices P and a tiny trained vector v, which modules share
by groups (peft/tuners/tinylora/layer.py, _compute_R; model.py, _create_and_replace). With
`save_projection=False` each module's P is made again from `projection_seed` and the module's place among
the targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polygraft.adapters.files.numbers import is_rank
from polygraft.adapters.files.problems import require
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.kind import side_path
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.adapters.peft.projections import check_key
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.spec import BaseSpec


class TinyLora(ModuleKind):
    """Singular vectors of the base's weight, mixed by a tiny trained vector."""

    peft_type = "TINYLORA"
    title = "TinyLoRA"
    paper = "2602.04118"
    rows = (side_path(),)
    training_only = ("init_v_bound", "tinylora_dropout", "fan_in_fan_out", "init_weights")
    trains_biases = True

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._rank = reader.option("r", int, 2)
        self._size = reader.option("u", int, 64)
        self._tying = reader.option("weight_tying", (int, float), 0.0)
        self._seed = reader.option("projection_seed", int, 42)
        self._saved = reader.option("save_projection", bool, True)

    def begin(self, targets: Sequence[str]) -> None:
        """Take the vectors that groups of modules share."""
        valid = is_rank(self._rank) and is_rank(self._size) and 0 <= self._tying <= 1
        require(valid, r=self._rank, u=self._size, weight_tying=self._tying)
        for seed in (self._seed, self._seed + len(targets)):
            check_key("projection_seed", seed)
        self._groups = _groups(len(targets), self._tying)
        names = [f"base_model.tinylora_v.{group}" for group in sorted(set(self._groups))]
        self._vectors = self.reader.take_all([(name, (self._size,)) for name in names], wide=True)

    def change(self, module: TargetModule) -> ModuleChange:
        """Return A and B R."""
        rank, size = min(self._rank, module.inputs, module.outputs), self._size
        a, b, *saved = module.take_all(
            ("tinylora_A", (rank, module.inputs)),
            ("tinylora_B", (module.outputs, rank)),
            *([("tinylora_P", (size, rank, rank))] if self._saved else []),
        )
        if saved:
            random = saved[0]
        else:
            self.reader.need_room(rank, size * rank * rank)
            generator = torch.Generator().manual_seed(self._seed + module.place)
            random = torch.normal(0.0, 1.0 / rank**0.5, (size, rank, rank), generator=generator)
        middle = torch.einsum("i,ijk->jk", self._vectors[self._groups[module.place]], random)
        return module.low_rank(a, b @ middle)


def _groups(modules: int, tying: float) -> list[int]:
    """The vector of each module, by its place: from one for each to one for all."""
    groups = max(1, round(modules * (1.0 - tying)))
    each = max(1, modules // groups)
    return [min(place // each, groups - 1) for place in range(modules)]
