"""MiSS (arXiv 2409.15371) as PEFT saves it, compiled to LowRank, or to Dense in one of its variants.

The input is cut into pieces of r, the last one filled up with zeros, and their sum is multiplied by
`miss_block` [r, out] (peft/tuners/miss/layer.py, MissLinear.forward): a LowRank whose A is identity
matrices side by side. With `init_weights="mini"` the file holds the first `mini_r` columns of the block,
which repeat.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch

from polygraft.adapters.files.numbers import is_rank
from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.targets import target_modules
from polygraft.adapters.peft.trained_biases import take_trained_biases
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import Dense, LowRank
from polygraft.core.spec import BaseSpec


@dataclass(frozen=True, slots=True)
class Squares(Dense):
    """The weight W, cut into squares, plus W B + B for each of them.

    Args:
        blocks: float32 [outputs / size, size, size], one B for all squares of these rows.
    """

    blocks: torch.Tensor

    @property
    def span(self) -> int:
        """See `Dense`."""
        return self.blocks.shape[1]

    def fold(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """See `Dense`."""
        size = self.span
        squares = weight.view(-1, size, weight.shape[1] // size, size)
        own = self.blocks[first // size :][: len(squares)]
        return (squares + torch.einsum("oabi,oij->oabj", squares, own) + own[:, :, None]).view(weight.shape)


def compile_miss(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a MiSS folder; yields between modules. Problems are noted in the reader."""
    rank = reader.option("r", int, 64)
    variant = reader.option("init_weights", (bool, str), True)
    width = reader.option("mini_r", int, 1)
    reader.ignore("miss_dropout")
    modules = target_modules(reader, base)
    biases, norms = take_trained_biases(reader, base, modules)
    mini = variant == "mini"
    if isinstance(variant, str) and variant not in ("mini", "bat"):
        reader.problems.append(f"init_weights {shown(variant)} isn't one of PEFT's variants")
    if not is_rank(rank) or (mini and not is_rank(width)):
        reader.problems.append(f"r {shown(rank)} with mini_r {shown(width)} makes no sense")
        modules = []
    low_rank: dict[str, LowRank] = {}
    dense: dict[str, Dense] = {}
    for module in modules:
        yield
        shape = base.linears[module]
        outputs = width if mini else shape.out_features
        fits = rank <= shape.in_features and shape.out_features % outputs == 0
        if variant == "bat":
            fits = shape.in_features % rank == 0 and shape.out_features % rank == 0
        if not fits:
            reader.problems.append(
                f"r {rank} with mini_r {width} doesn't fit {module}'s {shape.in_features} inputs and "
                f"{shape.out_features} outputs"
            )
            continue
        name = f"{PREFIX}{module}.miss_block"
        if variant == "bat":
            blocks = reader.take(name, (shape.out_features // rank, rank, rank), wide=True)
            if blocks is not None:
                dense[module] = Squares(blocks)
            continue
        block = reader.take(name, (rank, outputs), wide=True)
        if block is None or not reader.has_room(rank, rank * (shape.in_features + shape.out_features)):
            continue
        pieces = -(-shape.in_features // rank)
        a = reader.keep(torch.eye(rank).repeat(1, pieces)[:, : shape.in_features], module)
        b = reader.keep(block.repeat(1, shape.out_features // outputs).T, module)
        if a is not None and b is not None:
            low_rank[module] = LowRank(a, b)
    return AdapterWeights(
        "miss", reader.parameters, by_module(low_rank=low_rank, dense=dense, bias=biases, norm=norms)
    )
