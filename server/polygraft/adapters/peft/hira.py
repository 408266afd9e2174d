"""HiRA (ICLR 2025, openreview TwJrTz9cRS) as PEFT saves it, compiled to Dense.

PEFT adds the base's weight times `hira_B hira_A`, element by element (peft/tuners/hira/layer.py,
Linear.forward). That is of full rank, and it depends on the weights that are served: on a quantized base,
on what they stand for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polygraft.adapters.kind import merged_copy
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import Dense


@dataclass(frozen=True, slots=True)
class Modulation(Dense):
    """The weight times 1 + B A, element by element.

    Args:
        a: float32 [rank, in_features]
        b: float32 [out_features, rank]
    """

    a: torch.Tensor
    b: torch.Tensor

    def fold(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """See `Dense`."""
        return weight * (1 + self.b[first : first + len(weight)] @ self.a)


class HiRa(ModuleKind):
    """The base's weight times a low-rank product, element by element."""

    peft_type = "HIRA"
    title = "HiRA"
    rows = (merged_copy("the base's weight times a low-rank product"),)
    # The rank is the file's, and PEFT doesn't follow its own rank_pattern.
    training_only = ("r", "rank_pattern", "hira_dropout", "fan_in_fan_out", "init_weights")

    def change(self, module: TargetModule) -> ModuleChange:
        """Return the product's factors."""
        a = module.take("hira_A", (None, module.inputs))
        return ModuleChange(dense=Modulation(a, module.take("hira_B", (module.outputs, len(a)))))
