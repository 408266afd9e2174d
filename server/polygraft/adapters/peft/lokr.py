"""LoKr (arXiv 2309.14859) as PEFT saves it, compiled to Kron.

PEFT adds `x @ W.T` with W = kron(w1, w2) * alpha / r (peft/tuners/lokr/layer.py, get_delta_weight). The sides
of w1 are a divisor of the module's outputs and one of its inputs (`_divided`); either factor is saved whole,
or as a product of rank r where that is smaller (LoKrLayer.update_layer).
"""

from __future__ import annotations

import math
from collections.abc import Generator

import torch

from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.peft.per_module import PREFIX, ModuleSettings
from polygraft.adapters.peft.targets import BAD_PATTERN, target_modules
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import Kron
from polygraft.core.spec import BaseSpec

# `use_effective_conv2d` is for convolutions of more than one position; there are none among linear modules.
_NO_EFFECT = ("rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights", "use_effective_conv2d")


def compile_lokr(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a LoKr folder; yields between modules. Problems are noted in the reader."""
    settings = ModuleSettings(reader, "alpha")
    both = reader.option("decompose_both", bool, False)
    factor = reader.option("decompose_factor", int, -1)
    reader.ignore(*_NO_EFFECT)
    krons: dict[str, Kron] = {}
    for module in target_modules(reader, base):
        yield
        shape = base.linears[module]
        try:
            rank_and_alpha = settings.of(module)
        except BAD_PATTERN as error:
            settings.note_bad_pattern(error)
            break
        if rank_and_alpha is None:
            continue
        rank, alpha = rank_and_alpha
        (o1, o2), (i1, i2) = _divided(shape.out_features, factor), _divided(shape.in_features, factor)
        has_room = reader.has_room(0, o1 * i1 + o2 * i2, torch.float32)
        w1 = _factor(reader, f"{module}.lokr_w1", o1, i1, rank if both else None, has_room=has_room)
        w2 = _factor(reader, f"{module}.lokr_w2", o2, i2, rank, has_room=has_room)
        if w1 is None or w2 is None:
            continue
        w1 = reader.keep(w1 * (alpha / rank), module, torch.float32)
        w2 = reader.keep(w2, module, torch.float32)
        if w1 is not None and w2 is not None:
            krons[module] = Kron(w1, w2)
    return AdapterWeights("lokr", reader.parameters, by_module(kron=krons))


def _divided(dimension: int, factor: int) -> tuple[int, int]:
    """A number of inputs or outputs as PEFT's product of two (peft/tuners/lokr/layer.py, factorization).

    The first is `factor` if that divides it; else the largest divisor that is neither over `factor`, unless
    that is -1, nor over the square root.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    most = math.isqrt(dimension) if factor == -1 else min(factor, math.isqrt(dimension))
    first = next((divisor for divisor in range(most, 0, -1) if dimension % divisor == 0), 1)
    return first, dimension // first


def _factor(
    reader: FolderReader, name: str, rows: int, columns: int, rank: int | None, *, has_room: bool
) -> torch.Tensor | None:
    """One factor [rows, columns] in float32, saved as a product if its rank, unless None, is small enough."""
    if rank is None or rank >= max(rows, columns) / 2:
        return reader.take(f"{PREFIX}{name}", (rows, columns), wide=True)
    a = reader.take(f"{PREFIX}{name}_a", (rows, rank), wide=True)
    b = reader.take(f"{PREFIX}{name}_b", (rank, columns), wide=True)
    return a @ b if a is not None and b is not None and has_room else None
