"""PEANuT (arXiv 2410.01870) as PEFT saves it, compiled to LowRank.

PEFT adds to the base's weight W what a small network makes of it, row by row of W^T: `scaling * B f(A W^T)`,
f being an activation, `depth` encoders and decoders with an activation each, and a decoder's output added to
its encoder's input (peft/tuners/peanut/layer.py, _compute_delta_weight). The network never reads the module's
input, so what it makes of W is a LoRA's A, computed once when the base's weights are at hand.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace

import torch
from transformers.activations import ACT2FN

from polygraft.adapters.files.numbers import is_alpha, is_rank
from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.targets import target_modules
from polygraft.core.adapter_weights import AdapterWeights, by_module
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


def compile_peanut(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a PEANuT folder; yields between modules. Problems are noted in the reader."""
    rank = reader.option("r", int, 32)
    depth = reader.option("depth", int, 0)
    activation = reader.option("act_fn", str, "relu")
    scaling = reader.option("scaling", (int, float), 1.0)
    reader.ignore("init_weights")
    modules = target_modules(reader, base)
    sensible = is_rank(rank) and 0 <= depth <= len(reader.names()) and is_alpha(scaling)
    if not sensible or activation not in ACT2FN:
        reader.problems.append(
            f"r {shown(rank)} with depth {shown(depth)}, act_fn {shown(activation)} and scaling "
            f"{shown(scaling)} makes no sense"
        )
        modules = []
    low_rank: dict[str, LowRank] = {}
    for module in modules:
        yield
        shape = base.linears[module]
        name = f"{PREFIX}{module}.peanut"
        into = reader.take(f"{name}_A.weight", (rank, shape.out_features), wide=True)
        out = reader.take(f"{name}_B.weight", (shape.out_features, rank), wide=True)
        layers = [
            reader.take(f"{name}_{side}coders.{at}.weight", (rank, rank), wide=True)
            for side in ("en", "de")
            for at in range(depth)
        ]
        found = tuple(layer for layer in layers if layer is not None)
        if into is None or out is None or len(found) < 2 * depth:
            continue
        if not reader.has_room(rank, rank * (shape.in_features + shape.out_features)):
            continue
        b = reader.keep(out, module, scaling=scaling)
        if b is not None:
            network = Network(into, found[:depth], found[depth:], activation)
            low_rank[module] = LowRank(
                torch.zeros(rank, shape.in_features), b, of_base=network, scaling=scaling
            )
    return AdapterWeights("peanut", reader.parameters, by_module(low_rank=low_rank))
