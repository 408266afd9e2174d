"""VeRA (arXiv 2310.11454) as PEFT saves it, compiled to LowRank.

PEFT adds `lambda_b * (lambda_d * (x @ vera_A.T)) @ vera_B.T` (peft/tuners/vera/layer.py, Linear.forward).
The random projections vera_A and vera_B are shared by all modules (`projections.py`).

Compiled, every module has weights of its own: VeRA's small files become as large as a LoRA of their rank.
"""

from __future__ import annotations

from collections.abc import Generator

from polygraft.adapters.files.numbers import is_rank
from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.projections import shared_projections
from polygraft.adapters.peft.targets import target_modules
from polygraft.adapters.peft.trained_biases import take_trained_biases
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import LowRank
from polygraft.core.spec import BaseSpec

_TRAINING_ONLY = ("vera_dropout", "d_initial", "fan_in_fan_out", "init_weights")


def compile_vera(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a VeRA folder; yields between modules. Problems are noted in the reader."""
    rank = reader.option("r", int, 256)
    reader.ignore(*_TRAINING_ONLY)
    modules = target_modules(reader, base)
    biases, norms = take_trained_biases(reader, base, modules)
    if not is_rank(rank):
        reader.problems.append(f"rank {shown(rank)} makes no sense")
        modules = []
    projections = shared_projections(reader, base, modules, ("vera_A", "vera_B"), (rank, rank))
    primitives: dict[str, LowRank] = {}
    for module in modules:
        yield
        shape = base.linears[module]
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
    return AdapterWeights("vera", reader.parameters, by_module(low_rank=primitives, bias=biases, norm=norms))
