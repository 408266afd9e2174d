"""PEANuT (arXiv 2410.01870) as PEFT saves it, compiled to LowRank.

PEFT adds to the base's weight W what a small network makes of it, row by row of W^T: `scaling * B f(A W^T)`,
f being an activation, `depth` encoders and decoders with an activation each, and a decoder's output added to
its encoder's input (peft/tuners/peanut/layer.py, _compute_delta_weight). The network never reads the module's
input, so what it makes of W is a LoRA's A, computed once when the base's weights are at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers.activations import ACT2FN

from polygraft.adapters.files.numbers import is_alpha, is_rank
from polygraft.adapters.files.problems import require
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.kind import side_path
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import LowRank, OfBase
from polygraft.core.spec import BaseSpec


@dataclass(frozen=True, slots=True)
class Network(OfBase):
    """Makes a out of the base's weight.

    Args:
        a: float32 [rank, out_features]
        encoders, decoders: float32 [rank, rank] each, as many of the ones as of the others.
        activation: one of transformers' names.
    """

    a: torch.Tensor
    encoders: tuple[torch.Tensor, ...]
    decoders: tuple[torch.Tensor, ...]
    activation: str

    def completed(self, primitive: LowRank, weight: torch.Tensor, bias: torch.Tensor | None) -> LowRank:
        """See `OfBase`."""
        activate = ACT2FN[self.activation]
        with torch.no_grad():
            hidden = activate(weight.t() @ self.a.t())
            inputs = []
            for encoder in self.encoders:
                inputs.append(hidden)
                hidden = activate(hidden @ encoder.t())
            for decoder in self.decoders:
                hidden = activate(hidden @ decoder.t()) + inputs.pop()
        return replace(primitive, a=hidden.t().to(primitive.b.dtype).contiguous(), of_base=None)


class Peanut(ModuleKind):
    """A small network of the base's weight."""

    peft_type = "PEANUT"
    title = "PEANuT"
    paper = "2410.01870"
    rows = (side_path("low-rank side path, made with the base's weights at load"),)
    training_only = ("init_weights",)

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._rank = reader.option("r", int, 32)
        self._depth = reader.option("depth", int, 0)
        self._activation = reader.option("act_fn", str, "relu")
        self._scaling = reader.option("scaling", (int, float), 1.0)

    def begin(self, targets: Sequence[str]) -> None:
        """Check the options; a depth beyond the number of tensors can't be saved."""
        valid = is_rank(self._rank) and 0 <= self._depth <= len(self.reader.names())
        valid = valid and is_alpha(self._scaling) and self._activation in ACT2FN
        require(valid, r=self._rank, depth=self._depth, act_fn=self._activation, scaling=self._scaling)

    def change(self, module: TargetModule) -> ModuleChange:
        """Return B and the network, which is still to be applied to the base's weight."""
        rank = self._rank
        into, out, *layers = module.take_all(
            ("peanut_A.weight", (rank, module.outputs)),
            ("peanut_B.weight", (module.outputs, rank)),
            *((f"peanut_encoders.{at}.weight", (rank, rank)) for at in range(self._depth)),
            *((f"peanut_decoders.{at}.weight", (rank, rank)) for at in range(self._depth)),
        )
        module.need_room(rank)
        b = module.keep(out, scaling=self._scaling)
        encoders, decoders = tuple(layers[: self._depth]), tuple(layers[self._depth :])
        network = Network(into, encoders, decoders, self._activation)
        a = torch.zeros(rank, module.inputs)
        return ModuleChange(LowRank(a, b, of_base=network, scaling=self._scaling))
