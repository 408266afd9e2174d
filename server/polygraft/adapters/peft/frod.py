"""FRoD as PEFT saves it, compiled to Dense.

PEFT writes the base's weight as `U diag(n) V^T`, with a V that all modules of one role share, and trains the
diagonal and a few elements beside it: `U (S + diag(l)) V^T` (peft/tuners/frod/layer.py, Linear.forward). V,
which is found by decompositions whose signs aren't certain, is in the file if that was saved with
`save_projection`; U is then W V^-T with its columns brought to length 1 (_calculate_frod_u_and_lambda), made
again of the base's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from polygraft.adapters.files.problems import OptionProblem, Problem, all_of, require
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.kind import merged_copy
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import Dense
from polygraft.core.spec import BaseSpec

_SHORTEST = 1e-12
"""Columns of U that are shorter are zero, as in PEFT."""
_ERROR = 1e-6
"""How far V times its inverse may be from nothing but ones on its diagonal."""


@dataclass(frozen=True, slots=True)
class Basis:
    """What modules of one role share.

    Args:
        v: float32 [in_features, in_features]
        inverse: float64, v's.
        rows, columns: int64 [elements], where S has them.
    """

    v: torch.Tensor
    inverse: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor


@dataclass(frozen=True, slots=True)
class Recomposed(Dense):
    """The weight, decomposed, and composed of other factors.

    Args:
        diagonal: float32 [in_features]
        elements: float32 [elements]
        lengths: float64 [in_features], of U's columns; None until it is completed.
    """

    basis: Basis
    diagonal: torch.Tensor
    elements: torch.Tensor
    lengths: torch.Tensor | None = None

    @property
    def needs_base(self) -> bool:
        """See `Dense`."""
        return self.lengths is None

    def completed(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Dense:
        """See `Dense`."""
        return replace(self, lengths=(weight.double() @ self.basis.inverse.t()).norm(dim=0))

    def fold(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """See `Dense`."""
        assert self.lengths is not None, "to be completed with the base's weights first"
        basis = self.basis
        u = weight.double() @ basis.inverse.t() / self.lengths
        u = u.where(self.lengths > _SHORTEST, 0.0).float()
        composed = u * self.diagonal
        composed.index_add_(1, basis.columns, u[:, basis.rows] * self.elements)
        return composed @ basis.v.t()


class Frod(ModuleKind):
    """The base's weight, decomposed and composed of other factors."""

    peft_type = "FROD"
    title = "FRoD"
    rows = (merged_copy("the base's weight composed anew", where="with `save_projection`"),)
    training_only = (
        "projection_prng_key", "regularization_alpha", "progressbar", "runtime_offload_base_weight",
        "frod_dropout", "fan_in_fan_out", "init_weights",
    )  # fmt: skip
    trains_biases = True

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._saved = reader.option("save_projection", bool, True)
        self._sparse = reader.option("sparse_rate", (int, float), 0.01)
        self._bases: dict[str, Basis | Problem] = {}

    def begin(self, targets: Sequence[str]) -> None:
        """Check the options."""
        if not self._saved:
            raise OptionProblem(
                "save_projection=False isn't served: what its numbers multiply isn't in the file, and made "
                "again it has other signs from one decomposition to another"
            )
        require(0 <= self._sparse <= 1, sparse_rate=self._sparse)

    def change(self, module: TargetModule) -> ModuleChange:
        """Return the module's factors, and the basis that it shares."""
        count = _elements(module.inputs, self._sparse)
        basis = self._basis(_role(module.name), module.inputs, count)
        if len(basis.v) != module.inputs:
            role = _role(module.name)
            raise Problem(f"{module.name} has {module.inputs} inputs, other {role} have {len(basis.v)}")
        diagonal, elements = module.take_all(
            ("frod_lambda_l", (module.inputs,)), ("frod_lambda_s_values", (count,))
        )
        return ModuleChange(dense=Recomposed(basis, diagonal, elements))

    def _basis(self, role: str, inputs: int, count: int) -> Basis:
        """Return what modules of a role share, taken once. Raises Problem for each of them."""
        if role not in self._bases:
            try:
                self._bases[role] = _take_basis(self.reader, role, inputs, count)
            except Problem as problem:
                self._bases[role] = problem
        basis = self._bases[role]
        if isinstance(basis, Problem):
            raise basis
        return basis


def _take_basis(reader: FolderReader, role: str, inputs: int, count: int) -> Basis:
    """Take what modules of a role share. Raises Problem."""
    v, places, size = all_of(
        lambda: reader.take(f"base_model.frod_V.{role}", (inputs, inputs), wide=True),
        lambda: reader.take_indices(f"base_model.frod_s_indices.{role}", (2, count), inputs),
        lambda: reader.take_indices(f"base_model.frod_s_size.{role}", (2,), inputs + 1),
    )
    if (size != inputs).any():
        raise Problem(f"tensor base_model.frod_s_size.{role} isn't [{inputs}, {inputs}]")
    reader.need_room(0, inputs * inputs, torch.float64)
    inverse, singular = torch.linalg.inv_ex(v.double())
    wrong = (v.double() @ inverse - torch.eye(inputs, dtype=torch.float64)).abs().max()
    if singular or not wrong < _ERROR:
        raise Problem(f"tensor base_model.frod_V.{role} has no inverse that can be computed")
    return Basis(v, inverse, places[0].contiguous(), places[1].contiguous())


def _elements(inputs: int, sparse: float) -> int:
    """How many elements S has beside its diagonal (peft/tuners/frod/model.py, _init_frod_projections)."""
    most = inputs * (inputs - 1)
    several = min(int(inputs * inputs * sparse), most)
    return max(1, several) if sparse > 0 and most else several


def _role(module: str) -> str:
    """PEFT's name for the modules that share a basis (peft/tuners/frod/model.py, _category_from_key)."""
    parts = module.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    role = f"{parts[-2]}_{parts[-1]}"
    return "attention_output" if role == "output_dense" and parts[-3:-2] == ["attention"] else role
