"""Uni-LoRA (arXiv 2506.00799) as PEFT saves it, compiled to LowRank.

Every element of every module's A and B is one of the few in `unilora_theta_d`, over the root of how often
that one is used (peft/tuners/unilora/layer.py, Linear._get_lora_matrices). Which one is in the file, or
with `save_indices=False` drawn again from `proj_seed` in the order of the modules
(peft/tuners/unilora/model.py, generate_index); the draw is NumPy's, which doesn't promise the same one in
every version.

Compiled, every module has weights of its own: a small file becomes as large as a LoRA of its rank.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import numpy as np
import torch

from polygraft.adapters.files.numbers import is_rank
from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.targets import target_modules
from polygraft.adapters.peft.trained_biases import take_trained_biases
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import LowRank
from polygraft.core.spec import BaseSpec

_TRAINING_ONLY = ("unilora_dropout", "fan_in_fan_out", "init_theta_d_bound", "init_weights")


def compile_unilora(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a Uni-LoRA folder; yields between modules. Problems are noted in the reader."""
    rank = reader.option("r", int, 4)
    length = reader.option("theta_d_length", int, 256)
    seed = reader.option("proj_seed", int, 42)
    saved = reader.option("save_indices", bool, False)
    reader.ignore(*_TRAINING_ONLY)
    modules = target_modules(reader, base)
    biases, norms = take_trained_biases(reader, base, modules)
    if not is_rank(rank) or not is_rank(length) or seed < 0:
        reader.problems.append(
            f"r {shown(rank)} with theta_d_length {shown(length)} and proj_seed {shown(seed)} makes no sense"
        )
        modules = []
    theta = reader.take("base_model.unilora_theta_d", (length,), wide=True)
    sizes = [rank * (base.linears[name].in_features + base.linears[name].out_features) for name in modules]
    # Before they are drawn: a file of a few numbers must not fill the memory.
    drawn = None
    if modules and reader.has_room(rank, sum(sizes)) and not saved:
        drawn = _drawn(sizes, length, seed)
    primitives: dict[str, LowRank] = {}
    for module in modules:
        yield
        shape = base.linears[module]
        shapes = (rank, shape.in_features), (shape.out_features, rank)
        factors = None
        if saved:
            factors = _saved(reader, f"{PREFIX}{module}.unilora_", shapes, length)
        elif drawn is not None:
            factors = _cut(next(drawn), shapes)
        if theta is None or factors is None:
            continue
        (which_a, scale_a), (which_b, scale_b) = factors
        a, b = reader.keep(theta[which_a] * scale_a, module), reader.keep(theta[which_b] * scale_b, module)
        if a is not None and b is not None:
            primitives[module] = LowRank(a, b)
    return AdapterWeights(
        "unilora",
        reader.parameters,
        by_module(low_rank=primitives, bias=biases, norm=norms),
    )


Factor = tuple[torch.Tensor, torch.Tensor]
"""Indices into theta and what each is multiplied by, both of the factor's shape."""


def _saved(
    reader: FolderReader, name: str, shapes: tuple[tuple[int, int], tuple[int, int]], length: int
) -> tuple[Factor, Factor] | None:
    """A's and B's from the file; None after noting what is wrong."""
    which = [
        reader.take_indices(f"{name}indices_{letter}", shape, length)
        for letter, shape in zip("AB", shapes, strict=True)
    ]
    scale = [
        reader.take(f"{name}scales_{letter}", shape, wide=True)
        for letter, shape in zip("AB", shapes, strict=True)
    ]
    if which[0] is None or which[1] is None or scale[0] is None or scale[1] is None:
        return None
    return (which[0], scale[0]), (which[1], scale[1])


def _drawn(sizes: Sequence[int], length: int, seed: int) -> Iterator[Factor]:
    """Each module's, drawn as PEFT does: each index equally often, as far as that goes, in a random order."""
    often, rest = divmod(sum(sizes), length)
    generator = np.random.default_rng(seed)
    which = np.repeat(np.arange(length), often)
    if rest:
        which = np.concatenate([which, generator.choice(length, size=rest, replace=False)])
    generator.shuffle(which)
    indices = torch.from_numpy(which)
    scale = torch.bincount(indices, minlength=length).float().rsqrt()
    for own in torch.split(indices, list(sizes)):
        yield own, scale[own]


def _cut(both: Factor, shapes: tuple[tuple[int, int], tuple[int, int]]) -> tuple[Factor, Factor]:
    """A module's into A's and B's."""
    first = shapes[0][0] * shapes[0][1]
    a = both[0][:first].view(shapes[0]), both[1][:first].view(shapes[0])
    b = both[0][first:].view(shapes[1]), both[1][first:].view(shapes[1])
    return a, b
