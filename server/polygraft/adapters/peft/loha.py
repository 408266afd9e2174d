"""LoHa (FedPara, arXiv 2108.06098) as PEFT saves it, compiled to LowRank.

PEFT adds `x @ W.T` with W = (w1_a @ w1_b) * (w2_a @ w2_b) * alpha / r, the products taken element by element
(peft/tuners/loha/layer.py, get_delta_weight). That is exactly of rank r²: for each pair (p, q) the outer
product of the columns `w1_a[:, p] * w2_a[:, q]` and the rows `w1_b[p] * w2_b[q]`. The compiled rank and what
it costs are therefore r².
"""

from __future__ import annotations

from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.kind import side_path
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.adapters.peft.per_module import RankAndAlpha
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.spec import BaseSpec

# `use_effective_conv2d` is for convolutions of more than one position; there are none among linear modules.


class LoHa(ModuleKind):
    """The element-wise product of two low-rank products."""

    peft_type = "LOHA"
    title = "LoHa"
    paper = "2108.06098"
    rows = (side_path("low-rank side path of rank r²", "r² × rows"),)
    # `use_effective_conv2d` is for convolutions of more than one position; no linear module is one.
    training_only = ("rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d")

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._settings = RankAndAlpha(reader, "alpha")

    def change(self, module: TargetModule) -> ModuleChange:
        """Return the product of rank r² that equals the element-wise one."""
        rank, alpha = self._settings.of(module.name)
        columns, rows = (module.outputs, rank), (rank, module.inputs)
        w1_a, w1_b, w2_a, w2_b = module.take_all(
            ("hada_w1_a", columns), ("hada_w1_b", rows), ("hada_w2_a", columns), ("hada_w2_b", rows)
        )
        module.need_room(rank * rank)
        a = (w1_b[:, None] * w2_b[None]).view(rank * rank, module.inputs)
        b = (w1_a[:, :, None] * w2_a[:, None]).view(module.outputs, rank * rank)
        return module.low_rank(a, b, alpha / rank)
