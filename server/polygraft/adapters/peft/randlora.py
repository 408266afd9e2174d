"""RandLoRA (arXiv 2502.00987) as PEFT saves it, compiled to Dense.

PEFT adds a sum of as many products of rank r as make full rank. Their factors are random and shared by all
modules; a module has learnt a scale for each row of each small factor, and one for each of its columns
(peft/tuners/randlora/ layer.py, get_scaled_bases; PEFT pairs the products' flattened ranks in two different
orders, which is what it trains). With `save_projection=False` the random factors are made again from
`projection_prng_key` (model.py, _init_randlora_A_randlora_B and its sparse variant; in bfloat16, which PEFT
draws them in wherever there is any).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from polygraft.adapters.files.numbers import is_alpha, is_rank
from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.projections import KEYS
from polygraft.adapters.peft.targets import target_modules
from polygraft.adapters.peft.trained_biases import take_trained_biases
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import Dense
from polygraft.core.spec import BaseSpec

_TRAINING_ONLY = ("randlora_dropout", "fan_in_fan_out", "init_weights")


@dataclass(frozen=True, slots=True)
class RandomBases(Dense):
    """The weight plus a product of full rank.

    Args:
        small: float32 [rank, 1, at least the smaller side], shared.
        large: float32 [at least the larger side, at least bases, rank], shared.
        gain: float32 [rank, bases], scaling folded in.
        side_gain: float32 [bases, the smaller side]
        inputs, outputs: of the module.
    """

    small: torch.Tensor
    large: torch.Tensor
    gain: torch.Tensor
    side_gain: torch.Tensor
    inputs: int
    outputs: int

    def fold(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """See `Dense`."""
        bases, side = self.side_gain.shape
        small = (self.gain[:, :, None] * self.small[:, :, :side] * self.side_gain).flatten(0, 1)
        last = first + len(weight)
        if self.inputs <= self.outputs:
            return weight + self.large[first:last, :bases].flatten(1) @ small
        return weight + small[:, first:last].T @ self.large[: self.inputs, :bases].flatten(1).T


def compile_randlora(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a RandLoRA folder; yields between modules. Problems are noted in the reader."""
    rank = reader.option("r", int, 32)
    alpha = reader.option("randlora_alpha", (int, float), 640)
    reader.ignore(*_TRAINING_ONLY)
    modules = target_modules(reader, base)
    biases, norms = take_trained_biases(reader, base, modules)
    if not is_rank(rank) or not is_alpha(alpha):
        reader.problems.append(f"rank {shown(rank)} with alpha {shown(alpha)} makes no sense")
        modules = []
    factors = _factors(reader, base, modules, rank)
    changes: dict[str, Dense] = {}
    for module in modules:
        yield
        shape = base.linears[module]
        if factors is not None:
            _take_copies(reader, module, factors)
        side = min(shape.in_features, shape.out_features)
        bases = -(-side // rank)
        gain = reader.take(f"{PREFIX}{module}.randlora_lambda", (rank, bases), wide=True)
        side_gain = reader.take(f"{PREFIX}{module}.randlora_gamma", (bases, side), wide=True)
        if factors is None or gain is None or side_gain is None:
            continue
        changes[module] = RandomBases(
            *factors, gain * (alpha / rank), side_gain, shape.in_features, shape.out_features
        )
    return AdapterWeights("randlora", reader.parameters, by_module(dense=changes, bias=biases, norm=norms))


def _factors(
    reader: FolderReader, base: BaseSpec, modules: Sequence[str], rank: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The shared factors as `RandomBases` has them; None after noting why there are none."""
    saved = reader.option("save_projection", bool, True)
    key = reader.option("projection_prng_key", int, 0)
    sparse = reader.option("sparse", bool, False)
    very_sparse = reader.option("very_sparse", bool, False)
    if key not in KEYS:
        reader.problems.append(f"projection_prng_key {shown(key)} isn't a number of 64 bits")
    if not modules:
        return None
    most_in = max(base.linears[module].in_features for module in modules)
    most_out = max(base.linears[module].out_features for module in modules)
    side, other = min(most_in, most_out), max(most_in, most_out)
    bases = -(-side // rank)
    if saved:
        small = reader.take("base_model.randlora_A", (rank, 1, side), wide=True)
        large = reader.take("base_model.randlora_B", (other, bases, rank), wide=True)
        return None if small is None or large is None else (small, large)
    if key not in KEYS or not reader.has_room(0, rank * (side + bases * other)):
        return None
    generator = torch.Generator().manual_seed(key)
    if sparse or very_sparse:
        sparsity = math.sqrt(side) if very_sparse else 3
        return (
            _signs((rank, 1, side), sparsity, generator),
            _signs((other, bases, rank), sparsity, generator),
        )
    small = _uniform((rank, 1, side), generator)
    large = torch.cat([_uniform((other, 1, rank), generator) for _ in range(bases)], 1)
    return (small / small.std()).float(), (large / large.std()).float()


def _take_copies(reader: FolderReader, module: str, factors: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Take the copies of the shared factors that PEFT saves with every module; note one that differs."""
    for letter, factor in zip("AB", factors, strict=True):
        name = f"{PREFIX}{module}.randlora_{letter}"
        if name not in reader.names():
            continue
        copy = reader.take(name, tuple(factor.shape), wide=True)
        if copy is not None and not torch.equal(copy, factor):
            reader.problems.append(f"tensor {name} isn't base_model.randlora_{letter}, which it is a copy of")


def _uniform(shape: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    return torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


def _signs(shape: tuple[int, int, int], sparsity: float, generator: torch.Generator) -> torch.Tensor:
    """-1, 0 and 1 (Achlioptas' projections), brought to a deviation of 1."""
    drawn = torch.rand(shape, generator=generator)
    edge = 1 / (2 * sparsity)
    signs = (drawn > 1 - edge).float() - (drawn < edge).float()
    return signs / signs.std()
