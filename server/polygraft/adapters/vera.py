"""VeRA (arXiv 2310.11454) as PEFT saves it, compiled to LowRank.

PEFT adds `lambda_b * (lambda_d * (x @ vera_A.T)) @ vera_B.T` (peft/tuners/vera/layer.py, Linear.forward).
The random projections vera_A and vera_B are shared by all modules, as large as the largest of them asks, and
each module takes its first columns of vera_A and its first rows of vera_B. With `save_projection=False` they
aren't in the file and are made again from `projection_prng_key` (peft/tuners/vera/model.py,
_init_vera_A_vera_B).

Compiled, every module has weights of its own: VeRA's small files become as large as a LoRA of their rank.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

import torch

from polygraft.adapters.per_module import PREFIX, is_rank, refuse_base_weights, refuse_trained_biases
from polygraft.adapters.primitives import CompiledAdapter, LowRank
from polygraft.adapters.reader import FolderReader, shown
from polygraft.adapters.targets import target_modules
from polygraft.base.spec import BaseSpec

_TRAINING_ONLY = ("vera_dropout", "d_initial", "fan_in_fan_out", "init_weights")
_KEYS = range(-(2**63), 2**64)  # those that torch's generator takes


def compile_vera(reader: FolderReader, base: BaseSpec) -> Generator[None, None, CompiledAdapter]:
    """Compile a VeRA folder; yields between modules. Problems are noted in the reader."""
    rank = reader.option("r", int, 256)
    refuse_trained_biases(reader)
    reader.ignore(*_TRAINING_ONLY)
    modules = target_modules(reader, base)
    if not is_rank(rank):
        reader.problems.append(f"rank {shown(rank)} makes no sense")
        modules = []
    projections = _projections(reader, base, modules, rank)
    primitives: dict[str, LowRank] = {}
    for module in modules:
        yield
        shape = base.linears[module]
        refuse_base_weights(reader, module)
        lambda_b = reader.take(f"{PREFIX}{module}.vera_lambda_b", (shape.out_features,), wide=True)
        lambda_d = reader.take(f"{PREFIX}{module}.vera_lambda_d", (rank,), wide=True)
        if projections is None or lambda_b is None or lambda_d is None:
            continue
        if not reader.has_room(rank, rank * (shape.in_features + shape.out_features)):
            continue
        shared_a, shared_b = projections
        a = reader.keep(lambda_d[:, None] * shared_a[:, : shape.in_features], module)
        b = reader.keep(lambda_b[:, None] * shared_b[: shape.out_features], module)
        if a is not None and b is not None:
            primitives[module] = LowRank(a, b)
    return CompiledAdapter("vera", reader.parameters, low_rank=primitives)


def _projections(
    reader: FolderReader, base: BaseSpec, modules: Sequence[str], rank: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """vera_A [rank, most inputs of a module] and vera_B [most outputs, rank]; None after noting why not."""
    saved = reader.option("save_projection", bool, True)
    key = reader.option("projection_prng_key", int, 0)
    if key not in _KEYS:
        reader.problems.append(f"projection_prng_key {shown(key)} isn't a number of 64 bits")
    if not modules:
        return None
    most_in = max(base.linears[module].in_features for module in modules)
    most_out = max(base.linears[module].out_features for module in modules)
    if saved:
        a = reader.take("base_model.vera_A", (rank, most_in), wide=True)
        b = reader.take("base_model.vera_B", (most_out, rank), wide=True)
        return None if a is None or b is None else (a, b)
    if key not in _KEYS or not reader.has_room(rank, 0):
        return None
    generator = torch.Generator().manual_seed(key)
    return _uniform(rank, most_in, generator), _uniform(most_out, rank, generator)


def _uniform(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Kaiming's uniform distribution, from PEFT's own order of draws (_kaiming_init)."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
