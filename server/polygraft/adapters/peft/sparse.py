"""Numbers for single elements of a weight, and the random places that some kinds put them in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polygraft.core.primitives import Dense


@dataclass(frozen=True, slots=True)
class Sparse(Dense):
    """The weight plus numbers for single elements of it; those of one element add up.

    Args:
        values: float32 [numbers]
        rows, columns: int32 [numbers], where they are; rows ascend.
    """

    values: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> Sparse:
        """From indices in any order."""
        order = rows.argsort(stable=True)
        return cls(values[order], rows[order].int(), columns[order].int())

    def fold(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """See `Dense`."""
        ends = torch.tensor([first, first + len(weight)], dtype=torch.int32, device=weight.device)
        mine = slice(*torch.searchsorted(self.rows, ends).tolist())
        places = self.rows[mine].long() - first, self.columns[mine].long()
        return weight.index_put_(places, self.values[mine], accumulate=True)


class RandomPlaces:
    """Places in matrices as FourierFT and WaveFT draw them: the same ones for the same shape.

    Args:
        seed: of the generator, which starts anew for every module.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._drawn: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, count: int, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and columns of so many places, int64 [count] each."""
        key = count, outputs, inputs
        if key not in self._drawn:
            generator = torch.Generator().manual_seed(self._seed)
            drawn = torch.randperm(outputs * inputs, generator=generator)[:count]
            self._drawn[key] = drawn // inputs, drawn % inputs
        return self._drawn[key]
