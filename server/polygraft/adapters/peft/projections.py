"""Random projections that all modules of an adapter share, of VeRA (arXiv 2310.11454) and its relatives.

They are as large as the largest module asks, and each takes its first inputs and its first outputs of them.
With `save_projection=False` they aren't in the file and are made again from `projection_prng_key`
(peft/tuners/vera/model.py, _init_vera_A_vera_B; peft/tuners/pvera/model.py, _init_pvera_A_pvera_B).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.core.spec import BaseSpec

KEYS = range(-(2**63), 2**64)
"""Seeds that torch's generator takes."""


def shared_projections(
    reader: FolderReader,
    base: BaseSpec,
    modules: Sequence[str],
    names: tuple[str, str],
    ranks: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Take or make the projections A and B, and take their options; None after noting why there are none.

    Args:
        names: of A and B in the file, below `base_model`.
        ranks: rows of A and columns of B.

    Returns:
        float32 [ranks[0], most inputs of a module] and [most outputs, ranks[1]].
    """
    saved = reader.option("save_projection", bool, True)
    key = reader.option("projection_prng_key", int, 0)
    if key not in KEYS:
        reader.problems.append(f"projection_prng_key {shown(key)} isn't a number of 64 bits")
    if not modules:
        return None
    most_in = max(base.linears[module].in_features for module in modules)
    most_out = max(base.linears[module].out_features for module in modules)
    if saved:
        a = reader.take(f"base_model.{names[0]}", (ranks[0], most_in), wide=True)
        b = reader.take(f"base_model.{names[1]}", (most_out, ranks[1]), wide=True)
        return None if a is None or b is None else (a, b)
    if key not in KEYS or not reader.has_room(ranks[1], 0):
        return None
    generator = torch.Generator().manual_seed(key)
    return _uniform(ranks[0], most_in, generator), _uniform(most_out, ranks[1], generator)


def _uniform(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Kaiming's uniform distribution, from PEFT's own order of draws (_kaiming_init)."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
