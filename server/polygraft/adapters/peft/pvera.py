"""PVeRA (arXiv 2512.07703) as PEFT saves it, compiled to LowRank.

A VeRA that has learnt a distribution: of the 2 r rows of `pvera_A`, scaled by `pvera_lambda_d`, the first r
give the mean and the others the logarithm of the variance. An answer takes the mean
(peft/tuners/pvera/layer.py, PveraLayer._reparametrize), unless `sample_at_inference` asks for noise of its
own in every forward.
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

_TRAINING_ONLY = ("pvera_dropout", "d_initial", "fan_in_fan_out", "init_weights", "generator_seed")


def compile_pvera(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a PVeRA folder; yields between modules. Problems are noted in the reader."""
    rank = reader.option("r", int, 256)
    reader.ignore(*_TRAINING_ONLY)
    modules = target_modules(reader, base)
    biases, norms = take_trained_biases(reader, base, modules)
    if not is_rank(rank):
        reader.problems.append(f"rank {shown(rank)} makes no sense")
        modules = []
    projections = shared_projections(reader, base, modules, ("pvera_A", "pvera_B"), (2 * rank, rank))
    primitives: dict[str, LowRank] = {}
    for module in modules:
        yield
        shape = base.linears[module]
        lambda_b = reader.take(f"{PREFIX}{module}.pvera_lambda_b", (shape.out_features,), wide=True)
        lambda_d = reader.take(f"{PREFIX}{module}.pvera_lambda_d", (2 * rank,), wide=True)
        if projections is None or lambda_b is None or lambda_d is None:
            continue
        if not reader.has_room(rank, rank * (shape.in_features + shape.out_features)):
            continue
        shared_a, shared_b = projections
        a = reader.keep(lambda_d[:rank, None] * shared_a[:rank, : shape.in_features], module)
        b = reader.keep(lambda_b[:, None] * shared_b[: shape.out_features], module)
        if a is not None and b is not None:
            primitives[module] = LowRank(a, b)
    return AdapterWeights("pvera", reader.parameters, by_module(low_rank=primitives, bias=biases, norm=norms))
