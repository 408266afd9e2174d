"""DeLoRA (arXiv 2503.18225) as PEFT saves it, compiled to LowRank.

PEFT adds `B diag(lambda / r / (|A_i| |B^i|)) A diag(w_norm)`, both norms at least 1e-4
(peft/tuners/delora/layer.py, DeloraLayer._compute_delta): the strength lambda is decoupled from the
directions. `w_norm`, the norms of the columns of the base's weight when training began, is in the file, so
the base's weights aren't needed.
"""

from __future__ import annotations

from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.kind import side_path
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.adapters.peft.per_module import RankAndAlpha
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.spec import BaseSpec

# The configuration's lambdas are those that training starts from.
_LEAST_NORM = 1e-4


class DeLora(ModuleKind):
    """A low-rank product of normalized factors, with a strength for each module."""

    peft_type = "DELORA"
    title = "DeLoRA"
    paper = "2503.18225"
    rows = (side_path(),)
    # The configuration's lambdas are the ones that training starts from.
    training_only = ("delora_lambda", "lambda_pattern", "module_dropout", "init_weights")
    trains_biases = True

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._settings = RankAndAlpha(reader, None)

    def change(self, module: TargetModule) -> ModuleChange:
        """Return the factors with norms and strength folded in."""
        rank, _ = self._settings.of(module.name)
        a, b, strength, w_norm = module.take_all(
            ("delora_A", (rank, module.inputs)),
            ("delora_B", (module.outputs, rank)),
            ("delora_lambda", (1,)),
            ("delora_w_norm", (module.inputs,)),
        )
        norms = a.norm(dim=1).clamp(min=_LEAST_NORM) * b.norm(dim=0).clamp(min=_LEAST_NORM)
        return module.low_rank(a * w_norm, b * (strength / rank / norms))
