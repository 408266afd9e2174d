"""GraLoRA (arXiv 2505.20355) as PEFT saves it, compiled to LowRank.

The weight is cut into k x k blocks, and each gets a product of rank r / k of its own. PEFT keeps the
factors of a column of blocks together, `gralora_A[n]`, and those of a row of blocks, `gralora_B[j]`; of the
r products that column n has, the j-th r / k go to row j (peft/tuners/gralora/layer.py, Linear.forward). All
blocks together are exactly of rank k r, and that is what it costs. A hybrid adds a plain LoRA of rank
`hybrid_r`. Scaling is alpha / (r + hybrid_r).
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from polygraft.adapters.files.numbers import is_alpha, is_rank
from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.targets import target_modules
from polygraft.adapters.peft.trained_biases import take_trained_biases
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import LowRank
from polygraft.core.spec import BaseSpec

_TRAINING_ONLY = ("gralora_dropout", "fan_in_fan_out", "init_weights")


def compile_gralora(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a GraLoRA folder; yields between modules. Problems are noted in the reader."""
    rank = reader.option("r", int, 32)
    hybrid = reader.option("hybrid_r", int, 0)
    blocks = reader.option("gralora_k", int, 2)
    alpha = reader.option("alpha", (int, float), 64)
    reader.ignore(*_TRAINING_ONLY)
    modules = target_modules(reader, base)
    biases, norms = take_trained_biases(reader, base, modules)
    if (
        not (is_rank(rank) and is_rank(blocks) and is_alpha(alpha))
        or rank % blocks
        or not 0 <= hybrid < 2**31
    ):
        reader.problems.append(
            f"r {shown(rank)} with gralora_k {shown(blocks)}, hybrid_r {shown(hybrid)} and alpha "
            f"{shown(alpha)} makes no sense"
        )
        modules = []
    primitives: dict[str, LowRank] = {}
    for module in modules:
        yield
        shape = base.linears[module]
        if shape.in_features % blocks or shape.out_features % blocks:
            reader.problems.append(
                f"gralora_k {blocks} doesn't divide {module}'s {shape.in_features} inputs and "
                f"{shape.out_features} outputs"
            )
            continue
        inputs, outputs = shape.in_features // blocks, shape.out_features // blocks
        name = f"{PREFIX}{module}.gralora_"
        block_a = reader.take(f"{name}A", (blocks, inputs, rank), wide=True)
        block_b = reader.take(f"{name}B", (blocks, rank, outputs), wide=True)
        plain_a = plain_b = None
        if hybrid:
            plain_a = reader.take(f"{name}A_general.weight", (hybrid, shape.in_features), wide=True)
            plain_b = reader.take(f"{name}B_general.weight", (shape.out_features, hybrid), wide=True)
        if block_a is None or block_b is None or (hybrid and (plain_a is None or plain_b is None)):
            continue
        total = blocks * rank + hybrid
        if not reader.has_room(total, total * (shape.in_features + shape.out_features)):
            continue
        a, b = _spread(block_a, block_b)
        if plain_a is not None and plain_b is not None:
            a, b = torch.cat([a, plain_a]), torch.cat([b, plain_b], 1)
        scaling = alpha / (rank + hybrid)
        kept_a, kept_b = reader.keep(a, module), reader.keep(b, module, scaling=scaling)
        if kept_a is not None and kept_b is not None:
            primitives[module] = LowRank(kept_a, kept_b, scaling=scaling)
    return AdapterWeights(
        "gralora",
        reader.parameters,
        by_module(low_rank=primitives, bias=biases, norm=norms),
    )


def _spread(block_a: torch.Tensor, block_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A [k r, in] and B [out, k r] of all blocks, from [k, in / k, r] and [k, r, out / k]."""
    blocks, inputs, rank = block_a.shape
    outputs, part = block_b.shape[2], rank // blocks
    a = block_a.new_zeros(blocks, rank, blocks, inputs)
    b = block_b.new_zeros(blocks, outputs, blocks, rank)
    for column in range(blocks):
        a[column, :, column] = block_a[column].T
        for row in range(blocks):
            # The products of this column that go to this row, and where the row's factors for the column are.
            mine = slice(row * part, (row + 1) * part)
            theirs = slice(column * part, (column + 1) * part)
            b[row, :, column, mine] = block_b[row, theirs].T
    return a.view(blocks * rank, -1), b.view(-1, blocks * rank)
