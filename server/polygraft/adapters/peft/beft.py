"""BEFT (arXiv 2509.15974) as PEFT saves it, compiled to LowRank of rank 0.

PEFT adds `beft_bias` to a module's output (peft/tuners/beft/layer.py, Linear.forward). A LowRank without a
product is its bias, which costs an addition.
"""

from __future__ import annotations

from polygraft.adapters.kind import side_path
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import LowRank


class Beft(ModuleKind):
    """A bias for each module."""

    peft_type = "BEFT"
    title = "BEFT"
    paper = "2509.15974"
    rows = (side_path("a bias", "an addition for each output"),)
    training_only = ("init_weights",)

    def change(self, module: TargetModule) -> ModuleChange:
        """Return a low-rank product of rank 0 with the bias."""
        bias = module.take("beft_bias", (1, module.outputs), wide=False)
        a, b = bias.new_zeros(0, module.inputs), bias.new_zeros(module.outputs, 0)
        return ModuleChange(LowRank(a, b, bias.float().flatten()))
