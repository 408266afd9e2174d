"""Random projections that all modules of an adapter share, of VeRA (arXiv 2310.11454) and its relatives.

They are as large as the largest module needs, and each module takes their first inputs and outputs. With
`save_projection=False` they aren't in the file and are made again from `projection_prng_key`
(peft/tuners/vera/model.py, _init_vera_A_vera_B; peft/tuners/pvera/model.py, _init_pvera_A_pvera_B).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from polygraft.adapters.files.problems import OptionProblem
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.files.shown import shown
from polygraft.core.spec import BaseSpec

KEYS = range(-(2**63), 2**64)
"""Seeds that torch's generator takes."""


def check_key(option: str, key: int) -> None:
    """Raise OptionProblem if torch's generator doesn't take a seed."""
    if key not in KEYS:
        raise OptionProblem(f"{option} {shown(key)} isn't a number of 64 bits")


class SharedProjections:
    """Takes or makes the projections A and B, and takes their options.

    Args:
        names: of A and B in the file, below `base_model`.
    """

    def __init__(self, reader: FolderReader, base: BaseSpec, names: tuple[str, str]) -> None:
        self._reader = reader
        self._base = base
        self._names = names
        self._saved = reader.option("save_projection", bool, True)
        self._key = reader.option("projection_prng_key", int, 0)

    def take(self, modules: Sequence[str], ranks: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A, float32 [ranks[0], most inputs of a module], and B, float32 [most outputs, ranks[1]].

        Raises:
            Problem: there are none, or they would be too large.
        """
        check_key("projection_prng_key", self._key)
        shapes = [self._base.linears[module] for module in modules]
        most_in = max((shape.in_features for shape in shapes), default=0)
        most_out = max((shape.out_features for shape in shapes), default=0)
        if self._saved and modules:
            names = [f"base_model.{name}" for name in self._names]
            a, b = self._reader.take_all(
                [(names[0], (ranks[0], most_in)), (names[1], (most_out, ranks[1]))], wide=True
            )
            return a, b
        self._reader.need_room(ranks[1], 0)
        generator = torch.Generator().manual_seed(self._key)
        return _uniform(ranks[0], most_in, generator), _uniform(most_out, ranks[1], generator)


def _uniform(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Return Kaiming's uniform distribution, in PEFT's own order of draws (_kaiming_init)."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(max(columns, 1)))
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
