"""TinyLoRA (arXiv 2602.04118) as PEFT saves it, compiled to LowRank.

PEFT adds `B R A` with A and B from the singular values of the base's weight, which are saved with the
adapter, and `R = sum_i v_i P_i` of fixed random matrices P and a tiny trained vector v, which modules share
by groups (peft/tuners/tinylora/layer.py, _compute_R; model.py, _create_and_replace). With
`save_projection=False` each module's P is made again from `projection_seed` and the module's place among
the targets.
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from polygraft.adapters.files.numbers import is_rank
from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.projections import KEYS
from polygraft.adapters.peft.targets import target_modules
from polygraft.adapters.peft.trained_biases import take_trained_biases
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import LowRank
from polygraft.core.spec import BaseSpec

_TRAINING_ONLY = ("init_v_bound", "tinylora_dropout", "fan_in_fan_out", "init_weights")


def compile_tinylora(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a TinyLoRA folder; yields between modules. Problems are noted in the reader."""
    rank = reader.option("r", int, 2)
    size = reader.option("u", int, 64)
    tying = reader.option("weight_tying", (int, float), 0.0)
    seed = reader.option("projection_seed", int, 42)
    saved = reader.option("save_projection", bool, True)
    reader.ignore(*_TRAINING_ONLY)
    modules = target_modules(reader, base)
    biases, norms = take_trained_biases(reader, base, modules)
    if not is_rank(rank) or not is_rank(size) or not 0 <= tying <= 1:
        reader.problems.append(
            f"r {shown(rank)} with u {shown(size)} and weight_tying {shown(tying)} makes no sense"
        )
        modules = []
    if not (seed in KEYS and seed + len(modules) in KEYS):
        reader.problems.append(f"projection_seed {shown(seed)} isn't a number of 64 bits")
        modules = []
    groups = _groups(len(modules), tying) if modules else []
    vectors = {
        group: reader.take(f"base_model.tinylora_v.{group}", (size,), wide=True)
        for group in sorted(set(groups))
    }
    primitives: dict[str, LowRank] = {}
    for place, module in enumerate(modules):
        yield
        shape = base.linears[module]
        own = min(rank, shape.in_features, shape.out_features)
        name = f"{PREFIX}{module}.tinylora_"
        a = reader.take(f"{name}A", (own, shape.in_features), wide=True)
        b = reader.take(f"{name}B", (shape.out_features, own), wide=True)
        random = None
        if saved:
            random = reader.take(f"{name}P", (size, own, own), wide=True)
        elif reader.has_room(own, size * own * own):
            generator = torch.Generator().manual_seed(seed + place)
            random = torch.normal(0.0, 1.0 / own**0.5, (size, own, own), generator=generator)
        vector = vectors[groups[place]]
        if a is None or b is None or random is None or vector is None:
            continue
        middle = torch.einsum("i,ijk->jk", vector, random)
        kept_a, kept_b = reader.keep(a, module), reader.keep(b @ middle, module)
        if kept_a is not None and kept_b is not None:
            primitives[module] = LowRank(kept_a, kept_b)
    return AdapterWeights(
        "tinylora",
        reader.parameters,
        by_module(low_rank=primitives, bias=biases, norm=norms),
    )


def _groups(modules: int, tying: float) -> list[int]:
    """The vector of each module, by its place: from one for each to one for all."""
    groups = max(1, round(modules * (1.0 - tying)))
    each = max(1, modules // groups)
    return [min(place // each, groups - 1) for place in range(modules)]
