"""FRoD as PEFT saves it, compiled to Dense.

PEFT writes the base's weight as `U diag(n) V^T`, with a V that all modules of one role share, and trains the
diagonal and a few elements beside it: `U (S + diag(l)) V^T` (peft/tuners/frod/layer.py, Linear.forward). V,
which is found by decompositions whose signs aren't certain, is in the file if that was saved with
`save_projection`; U is then W V^-T with its columns brought to length 1 (_calculate_frod_u_and_lambda), made
again of the base's weights.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace

import torch

from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.targets import target_modules
from polygraft.adapters.peft.trained_biases import take_trained_biases
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import Dense
from polygraft.core.spec import BaseSpec

_TRAINING_ONLY = (
    "projection_prng_key", "regularization_alpha", "progressbar", "runtime_offload_base_weight",
    "frod_dropout", "fan_in_fan_out", "init_weights",
)  # fmt: skip
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


def compile_frod(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a FRoD folder; yields between modules. Problems are noted in the reader."""
    saved = reader.option("save_projection", bool, True)
    sparse = reader.option("sparse_rate", (int, float), 0.01)
    reader.ignore(*_TRAINING_ONLY)
    modules = target_modules(reader, base)
    biases, norms = take_trained_biases(reader, base, modules)
    if not saved:
        reader.problems.append(
            "save_projection=False isn't served: what its numbers multiply isn't in the file, and made again "
            "it has other signs from one decomposition to another"
        )
        modules = []
    elif not 0 <= sparse <= 1:
        reader.problems.append(f"sparse_rate {shown(sparse)} makes no sense")
        modules = []
    bases: dict[str, Basis | None] = {}
    changes: dict[str, Dense] = {}
    for module in modules:
        yield
        shape = base.linears[module]
        role = _role(module)
        several = _elements(shape.in_features, sparse)
        if role not in bases:
            bases[role] = _basis(reader, role, shape.in_features, several)
        basis = bases[role]
        if basis is not None and len(basis.v) != shape.in_features:
            reader.problems.append(
                f"{module} has {shape.in_features} inputs, other {role} have {len(basis.v)}"
            )
            continue
        diagonal = reader.take(f"{PREFIX}{module}.frod_lambda_l", (shape.in_features,), wide=True)
        elements = reader.take(f"{PREFIX}{module}.frod_lambda_s_values", (several,), wide=True)
        if basis is not None and diagonal is not None and elements is not None:
            changes[module] = Recomposed(basis, diagonal, elements)
    return AdapterWeights("frod", reader.parameters, by_module(dense=changes, bias=biases, norm=norms))


def _basis(reader: FolderReader, role: str, inputs: int, several: int) -> Basis | None:
    """Take what modules of a role share; None after noting what is wrong."""
    v = reader.take(f"base_model.frod_V.{role}", (inputs, inputs), wide=True)
    places = reader.take_indices(f"base_model.frod_s_indices.{role}", (2, several), inputs)
    size = reader.take_indices(f"base_model.frod_s_size.{role}", (2,), inputs + 1)
    if size is not None and (size != inputs).any():
        reader.problems.append(f"tensor base_model.frod_s_size.{role} isn't [{inputs}, {inputs}]")
    if v is None or places is None or not reader.has_room(0, inputs * inputs, torch.float64):
        return None
    inverse, singular = torch.linalg.inv_ex(v.double())
    wrong = (v.double() @ inverse - torch.eye(inputs, dtype=torch.float64)).abs().max()
    if singular or not wrong < _ERROR:
        reader.problems.append(f"tensor base_model.frod_V.{role} has no inverse that can be computed")
        return None
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
