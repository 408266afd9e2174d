"""One module of the base that an adapter targets, with the tensors that the folder holds for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polygraft.adapters.files.reader import FolderReader, Shape
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import LowRank
from polygraft.core.spec import LinearShape

PREFIX = "base_model.model."
"""PEFT's, before the name of the base's module."""


@dataclass(frozen=True, slots=True)
class TargetModule:
    """A linear module of the base.

    Args:
        place: its number among the targets.
    """

    reader: FolderReader
    name: str
    shape: LinearShape
    place: int

    @property
    def inputs(self) -> int:
        """Features that it reads."""
        return self.shape.in_features

    @property
    def outputs(self) -> int:
        """Features that it gives."""
        return self.shape.out_features

    @property
    def sizes(self) -> str:
        """Its name and sizes for an error's text."""
        return f"{self.name}'s {self.inputs} inputs and {self.outputs} outputs"

    @property
    def prefix(self) -> str:
        """What the names of its tensors begin with."""
        return f"{PREFIX}{self.name}."

    def take(self, tensor: str, shape: Shape, *, wide: bool = True) -> torch.Tensor:
        """Take a tensor, in float32 if `wide`. Raises Problem."""
        return self.reader.take(self.prefix + tensor, shape, wide=wide)

    def take_all(self, *tensors: tuple[str, Shape], wide: bool = True) -> list[torch.Tensor]:
        """Take several tensors. Raises Problem with what is wrong with each of them."""
        return self.reader.take_all([(self.prefix + name, shape) for name, shape in tensors], wide=wide)

    def take_indices(self, tensor: str, shape: Shape, below: int, *, distinct: bool = False) -> torch.Tensor:
        """Take a tensor of indices in [0, below). Raises Problem."""
        return self.reader.take_indices(self.prefix + tensor, shape, below, distinct=distinct)

    def keep(
        self, tensor: torch.Tensor, dtype: torch.dtype | None = None, *, scaling: float = 1.0
    ) -> torch.Tensor:
        """Return a computed tensor in the type that adapters are kept in. Raises Problem."""
        return self.reader.keep(tensor, self.name, dtype, scaling=scaling)

    def need_room(self, rank: int) -> None:
        """Ask to compute low-rank weights of this rank. Raises Problem."""
        self.reader.need_room(rank, rank * (self.inputs + self.outputs))

    def low_rank(self, a: torch.Tensor, b: torch.Tensor, scaling: float = 1.0) -> ModuleChange:
        """Return computed low-rank weights in the type that adapters are kept in.

        Args:
            a: float32 [rank, in_features]
            b: float32 [out_features, rank]

        Raises:
            Problem: they aren't finite.
        """
        return ModuleChange(LowRank(self.keep(a), self.keep(b, scaling=scaling), scaling=scaling))
