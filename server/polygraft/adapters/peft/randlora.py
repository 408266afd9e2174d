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
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polygraft.adapters.files.numbers import is_alpha, is_rank
from polygraft.adapters.files.problems import Problem, require
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.kind import merged_copy
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.adapters.peft.projections import check_key
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import Dense
from polygraft.core.spec import BaseSpec


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


class RandLora(ModuleKind):
    """A sum of random products that all modules share, scaled in each."""

    peft_type = "RANDLORA"
    title = "RandLoRA"
    paper = "2502.00987"
    rows = (merged_copy("a product of full rank"),)
    training_only = ("randlora_dropout", "fan_in_fan_out", "init_weights")
    trains_biases = True

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._rank = reader.option("r", int, 32)
        self._alpha = reader.option("randlora_alpha", (int, float), 640)
        self._saved = reader.option("save_projection", bool, True)
        self._key = reader.option("projection_prng_key", int, 0)
        self._sparse = reader.option("sparse", bool, False)
        self._very_sparse = reader.option("very_sparse", bool, False)

    def begin(self, targets: Sequence[str]) -> None:
        """Take or make the shared factors."""
        require(is_rank(self._rank) and is_alpha(self._alpha), r=self._rank, randlora_alpha=self._alpha)
        check_key("projection_prng_key", self._key)
        self._factors = self._take_factors(targets) if targets else None

    def change(self, module: TargetModule) -> ModuleChange:
        """Return the module's scales of the shared factors."""
        assert self._factors is not None
        self._check_copies(module, self._factors)
        side = min(module.inputs, module.outputs)
        bases = -(-side // self._rank)
        gain, side_gain = module.take_all(
            ("randlora_lambda", (self._rank, bases)), ("randlora_gamma", (bases, side))
        )
        gain = gain * (self._alpha / self._rank)
        return ModuleChange(dense=RandomBases(*self._factors, gain, side_gain, module.inputs, module.outputs))

    def _check_copies(self, module: TargetModule, factors: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Take the copies of the shared factors that PEFT saves with every module.

        Raises:
            Problem: one differs.
        """
        for letter, factor in zip("AB", factors, strict=True):
            name = f"{module.prefix}randlora_{letter}"
            if self.reader.holds(name) and not torch.equal(
                self.reader.take(name, tuple(factor.shape), wide=True), factor
            ):
                raise Problem(f"tensor {name} isn't base_model.randlora_{letter}, which it is a copy of")

    def _take_factors(self, targets: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the shared factors as `RandomBases` has them."""
        shapes = [self.base.linears[name] for name in targets]
        most_in = max(shape.in_features for shape in shapes)
        most_out = max(shape.out_features for shape in shapes)
        side, other, rank = min(most_in, most_out), max(most_in, most_out), self._rank
        bases = -(-side // rank)
        of_small, of_large = (rank, 1, side), (other, bases, rank)
        if self._saved:
            names = ("base_model.randlora_A", of_small), ("base_model.randlora_B", of_large)
            small, large = self.reader.take_all(names, wide=True)
            return small, large
        self.reader.need_room(0, rank * (side + bases * other))
        generator = torch.Generator().manual_seed(self._key)
        if self._sparse or self._very_sparse:
            sparsity = math.sqrt(side) if self._very_sparse else 3
            return _signs(of_small, sparsity, generator), _signs(of_large, sparsity, generator)
        small = _uniform(of_small, generator)
        large = torch.cat([_uniform((other, 1, rank), generator) for _ in range(bases)], 1)
        return (small / small.std()).float(), (large / large.std()).float()


def _uniform(shape: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    return torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


def _signs(shape: tuple[int, int, int], sparsity: float, generator: torch.Generator) -> torch.Tensor:
    """-1, 0 and 1 (Achlioptas' projections), brought to a deviation of 1."""
    drawn = torch.rand(shape, generator=generator)
    edge = 1 / (2 * sparsity)
    signs = (drawn > 1 - edge).float() - (drawn < edge).float()
    return signs / signs.std()
