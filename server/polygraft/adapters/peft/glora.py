"""GLoRA (arXiv 2306.07967) as PEFT saves it, compiled to Scale and LowRank, or to Dense.

PEFT makes `W + W * A + B` of the base's weight, element by element, and `b + b * D + E + W C` of its bias,
where it has one (peft/tuners/glora/layer.py, GloraLinear.forward). With A and B a number for each output, or
one for all, that is a scale of the outputs and a product of rank one, B times the sum of the inputs. With A
and B products of low rank ("lora") W * A has no low rank. What an option leaves out is in the file as zeros.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace

import torch

from polygraft.adapters.files.numbers import is_rank
from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.targets import target_modules
from polygraft.adapters.peft.trained_biases import take_trained_biases
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import Dense, LowRank, OfBase, Scale
from polygraft.core.spec import BaseSpec


@dataclass(frozen=True, slots=True)
class BiasGain(OfBase):
    """What a module's bias gains: `b * D + E + W C`.

    Args:
        c: float32 [in_features]
        d, e: float32 [out_features] or [1]
        own: [out_features] in the place of the module's own bias, or None.
    """

    c: torch.Tensor
    d: torch.Tensor
    e: torch.Tensor
    own: torch.Tensor | None = None

    def completed(self, primitive: LowRank, weight: torch.Tensor, bias: torch.Tensor | None) -> LowRank:
        """See `OfBase`."""
        return replace(primitive, bias=self.of(weight, bias), of_base=None)

    def of(self, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """float32 [out_features], for the module's weight float32 [out_features, in_features] and bias."""
        bias = bias if self.own is None else self.own.float()
        assert bias is not None, "a module without a bias gains none"
        return bias * self.d + self.e + weight @ self.c


@dataclass(frozen=True, slots=True)
class Modulation(Dense):
    """The weight times 1 + A, element by element, and B, both of low rank.

    Args:
        a_out, b_out: float32 [out_features, rank]
        a_in, b_in: float32 [rank, in_features]
        gain: the bias'; None where the module has none. Completed, it is float32 [out_features].
    """

    a_out: torch.Tensor
    a_in: torch.Tensor
    b_out: torch.Tensor
    b_in: torch.Tensor
    gain: BiasGain | torch.Tensor | None

    @property
    def needs_base(self) -> bool:
        """See `Dense`."""
        return isinstance(self.gain, BiasGain)

    def completed(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Dense:
        """See `Dense`."""
        return replace(self, gain=self.gain.of(weight, bias)) if isinstance(self.gain, BiasGain) else self

    def fold(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """See `Dense`."""
        rows = slice(first, first + len(weight))
        return weight * (1 + self.a_out[rows] @ self.a_in) + self.b_out[rows] @ self.b_in

    def fold_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """See `Dense`."""
        assert not isinstance(self.gain, BiasGain), "to be completed with the base's weights first"
        return bias if bias is None or self.gain is None else bias + self.gain


def compile_glora(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a GLoRA folder; yields between modules. Problems are noted in the reader."""
    rank = reader.option("r", int, 8)
    of_weight = reader.option("config_A_B", str, "lora")
    of_both = reader.option("config_C", str, "lora")
    of_bias = reader.option("config_D_E", str, "constant")
    reader.ignore("init_weights")
    modules = target_modules(reader, base)
    biases, norms = take_trained_biases(reader, base, modules)
    known = (
        of_weight in ("lora", "vector", "constant", "none")
        and of_both in ("lora", "vector", "none")
        and of_bias in ("vector", "constant", "none")
    )
    if not known or not is_rank(rank):
        reader.problems.append(
            f"r {shown(rank)} with config_A_B {shown(of_weight)}, config_C {shown(of_both)} and config_D_E "
            f"{shown(of_bias)} makes no sense"
        )
        modules = []
    low_rank: dict[str, LowRank] = {}
    scales: dict[str, Scale] = {}
    dense: dict[str, Dense] = {}
    for module in modules:
        yield
        shape = base.linears[module]
        weight_like, bias_like = (shape.out_features, shape.in_features), (shape.out_features,)
        a, b = (_path(reader, module, path, of_weight, weight_like, rank) for path in "AB")
        c = _path(reader, module, "C", of_both if shape.has_bias else "none", (shape.in_features, 1), rank)
        d, e = (
            _path(reader, module, path, of_bias if shape.has_bias else "none", bias_like, rank)
            for path in "DE"
        )
        if a is None or b is None or c is None or d is None or e is None:
            continue
        gain = None
        if shape.has_bias:
            both = (c[0] @ c[1] if len(c) == 2 else c[0])[:, 0]
            gain = BiasGain(both, d[0], e[0], biases.get(module))
        if of_weight == "lora":
            dense[module] = Modulation(a[0], a[1], b[0], b[1], gain)
        elif of_weight == "none":
            if gain is not None:
                nothing = torch.zeros(0, shape.in_features), torch.zeros(shape.out_features, 0)
                low_rank[module] = LowRank(*nothing, of_base=gain)
        else:
            ones = reader.keep(torch.ones(1, shape.in_features), module)
            column = reader.keep(b[0] * torch.ones(shape.out_features, 1), module)
            if ones is not None and column is not None:
                scales[module] = Scale(output=((1 + a[0]) * torch.ones(shape.out_features, 1))[:, 0])
                low_rank[module] = LowRank(ones, column, of_base=gain)
    return AdapterWeights(
        "glora",
        reader.parameters,
        by_module(low_rank=low_rank, scale=scales, dense=dense, bias=biases, norm=norms),
        of_base="modulation",
    )


def _path(
    reader: FolderReader, module: str, path: str, how: str, shape: tuple[int, ...], rank: int
) -> tuple[torch.Tensor, ...] | None:
    """Take one of a module's five: two factors of the shape, or what is broadcast to it; None after noting
    what is wrong."""
    name = f"{PREFIX}{module}.glora_{path}"
    if how == "lora":
        down = reader.take(f"{name}.Xd", (shape[0], rank), wide=True)
        up = reader.take(f"{name}.Xu", (rank, shape[1]), wide=True)
        return None if down is None or up is None else (down, up)
    if how == "none":
        zeros = reader.take(f"{name}.zeros", shape, wide=True)
        if zeros is not None and zeros.any():
            reader.problems.append(f"tensor {name}.zeros stands for nothing, but isn't zero")
        return None if zeros is None else (zeros,)
    each = (1,) if how == "constant" else (shape[0], 1)[: len(shape)]
    numbers = reader.take(f"{name}.X", each, wide=True)
    return None if numbers is None else (numbers,)
