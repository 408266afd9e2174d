"""GLoRA (arXiv 2306.07967) as PEFT saves it, compiled to Scale and LowRank, or to Dense.

PEFT makes `W + W * A + B` of the base's weight, element by element, and `b + b * D + E + W C` of its bias,
where it has one (peft/tuners/glora/layer.py, GloraLinear.forward). With A and B a number for each output, or
one for all, that is a scale of the outputs and a product of rank one, B times the sum of the inputs. With A
and B products of low rank ("lora") W * A has no low rank. What an option leaves out is in the file as zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from polygraft.adapters.files.numbers import is_rank
from polygraft.adapters.files.problems import Problem, require
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.kind import merged_copy, side_path
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import Dense, LowRank, OfBase, Scale
from polygraft.core.spec import BaseSpec


@dataclass(frozen=True, slots=True)
class BiasGain(OfBase):
    """What a module's bias gains: `b * D + E + W C`.

    Args:
        c: float32 [in_features]
        d, e: float32 [out_features] or [1]
    """

    c: torch.Tensor
    d: torch.Tensor
    e: torch.Tensor

    def completed(self, primitive: LowRank, weight: torch.Tensor, bias: torch.Tensor | None) -> LowRank:
        """See `OfBase`."""
        return replace(primitive, bias=self.of(weight, bias), of_base=None)

    def of(self, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """float32 [out_features], for the module's weight float32 [out_features, in_features] and bias."""
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


class GLora(ModuleKind):
    """Modulates and shifts the weight, and the bias."""

    peft_type = "GLORA"
    title = "GLoRA"
    paper = "2306.07967"
    rows = (
        side_path("scales of outputs and a product of rank one", "a product for each output, and 1 × rows"),
        merged_copy("the weight times a low-rank product", where='with `config_A_B="lora"`'),
    )
    training_only = ("init_weights",)
    trains_biases = True
    of_base = "modulation"

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._rank = reader.option("r", int, 8)
        self._of_weight = reader.option("config_A_B", str, "lora")
        self._of_both = reader.option("config_C", str, "lora")
        self._of_bias = reader.option("config_D_E", str, "constant")

    def begin(self, targets: Sequence[str]) -> None:
        """Check the options."""
        valid = (
            is_rank(self._rank)
            and self._of_weight in ("lora", "vector", "constant", "none")
            and self._of_both in ("lora", "vector", "none")
            and self._of_bias in ("vector", "constant", "none")
        )
        require(
            valid,
            r=self._rank,
            config_A_B=self._of_weight,
            config_C=self._of_both,
            config_D_E=self._of_bias,
        )

    def change(self, module: TargetModule) -> ModuleChange | None:
        """Return the change of the weight, and the bias' gain."""
        inputs, outputs, has_bias = module.inputs, module.outputs, module.shape.has_bias
        a, b = (self._path(module, path, self._of_weight, (outputs, inputs)) for path in "AB")
        c = self._path(module, "C", self._of_both if has_bias else "none", (inputs, 1))
        d, e = (self._path(module, path, self._of_bias if has_bias else "none", (outputs,)) for path in "DE")
        gain = None
        if has_bias:
            both = (c[0] @ c[1] if len(c) == 2 else c[0])[:, 0]
            gain = BiasGain(both, d[0], e[0])
        if self._of_weight == "lora":
            return ModuleChange(dense=Modulation(a[0], a[1], b[0], b[1], gain))
        if self._of_weight == "none":
            nothing = torch.zeros(0, inputs), torch.zeros(outputs, 0)
            return None if gain is None else ModuleChange(LowRank(*nothing, of_base=gain))
        ones = module.keep(torch.ones(1, inputs))
        column = module.keep(b[0] * torch.ones(outputs, 1))
        scale = Scale(output=((1 + a[0]) * torch.ones(outputs, 1))[:, 0])
        return ModuleChange(LowRank(ones, column, of_base=gain), scale)

    def _path(
        self, module: TargetModule, path: str, how: str, shape: tuple[int, ...]
    ) -> tuple[torch.Tensor, ...]:
        """Take one of a module's five: two factors of the shape, or a smaller tensor. Raises Problem."""
        name = f"glora_{path}"
        if how == "lora":
            factors = (f"{name}.Xd", (shape[0], self._rank)), (f"{name}.Xu", (self._rank, shape[1]))
            return tuple(module.take_all(*factors))
        if how == "none":
            zeros = module.take(f"{name}.zeros", shape)
            if zeros.any():
                raise Problem(f"tensor {module.prefix}{name}.zeros stands for nothing, but isn't zero")
            return (zeros,)
        each = (1,) if how == "constant" else (shape[0], 1)[: len(shape)]
        return (module.take(f"{name}.X", each),)
