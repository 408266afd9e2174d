"""VB-LoRA (arXiv 2405.15179) as PEFT saves it, compiled to LowRank.

Rows of A and columns of B are put together from pieces, each a mixture of the `topk` likeliest vectors of a
bank that all modules share; the weights are the softmax of their logits (peft/tuners/vblora/layer.py,
Linear._get_low_rank_matrix). With `save_only_topk_weights` the file holds which vectors these are, and all
weights but the last, which makes up for the rest (peft/tuners/vblora/model.py,
_remap_adapter_state_dict_for_load).

Compiled, every module has weights of its own: a small file becomes as large as a LoRA of its rank.
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
from polygraft.core.primitives import LowRank
from polygraft.core.spec import BaseSpec

_TRAINING_ONLY = ("vblora_dropout", "fan_in_fan_out", "init_vector_bank_bound", "init_logits_std")
_ROUNDING = 1e-2  # how far weights that were saved in sixteen bits may be from adding up to one


def compile_vblora(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a VB-LoRA folder; yields between modules. Problems are noted in the reader."""
    rank = reader.option("r", int, 4)
    vectors = reader.option("num_vectors", int, 256)
    length = reader.option("vector_length", int, 256)
    top = reader.option("topk", int, 2)
    only_top = reader.option("save_only_topk_weights", bool, False)
    reader.ignore(*_TRAINING_ONLY)
    modules = target_modules(reader, base)
    biases, norms = take_trained_biases(reader, base, modules)
    if not all(is_rank(number) for number in (rank, vectors, length, top)) or top > vectors:
        reader.problems.append(
            f"r {shown(rank)} with num_vectors {shown(vectors)}, vector_length {shown(length)} and topk "
            f"{shown(top)} makes no sense"
        )
        modules = []
    bank = reader.take("base_model.vblora_vector_bank", (vectors, length), wide=True)
    mixtures = _Mixtures(reader, bank, vectors, top, only_top)
    primitives: dict[str, LowRank] = {}
    for module in modules:
        yield
        shape = base.linears[module]
        if shape.in_features % length or shape.out_features % length:
            reader.problems.append(
                f"vector_length {length} doesn't divide {module}'s {shape.in_features} inputs and "
                f"{shape.out_features} outputs"
            )
            continue
        if not reader.has_room(rank, rank * (shape.in_features + shape.out_features)):
            break
        rows = mixtures.take(f"{PREFIX}{module}.vblora_logits_A", rank, shape.in_features // length)
        columns = mixtures.take(f"{PREFIX}{module}.vblora_logits_B", shape.out_features // length, rank)
        if rows is None or columns is None:
            continue
        a = reader.keep(rows.flatten(1), module)
        b = reader.keep(columns.transpose(1, 2).flatten(0, 1), module)
        if a is not None and b is not None:
            primitives[module] = LowRank(a, b)
    return AdapterWeights(
        "vblora",
        reader.parameters,
        by_module(low_rank=primitives, bias=biases, norm=norms),
    )


@dataclass(frozen=True, slots=True)
class _Mixtures:
    """Takes logits, or what is saved in their place.

    Args:
        bank: [vectors, length], or None where there is none.
    """

    reader: FolderReader
    bank: torch.Tensor | None
    vectors: int
    top: int
    only_top: bool

    def take(self, name: str, rows: int, columns: int) -> torch.Tensor | None:
        """The mixed vectors [rows, columns, length]; None after noting what is wrong."""
        if self.only_top:
            which = self.reader.take_indices(
                f"{name}_topk_indices", (rows, columns, self.top), self.vectors, distinct=True
            )
            shares = self.reader.take(f"{name}_topk_weights", (rows, columns, self.top - 1), wide=True)
            if which is None or shares is None:
                return None
            shares = torch.cat([shares, 1 - shares.sum(-1, keepdim=True)], -1)
            if (
                shares.numel()
                and not -_ROUNDING <= float(shares.min()) <= float(shares.max()) <= 1 + _ROUNDING
            ):
                self.reader.problems.append(
                    f"tensor {name}_topk_weights holds weights that don't add up to one"
                )
                return None
            shares = shares.clamp(min=0)
        else:
            logits = self.reader.take(name, (rows, columns, self.vectors), wide=True)
            if logits is None:
                return None
            best, which = logits.topk(self.top, dim=-1)
            shares = best.softmax(-1)
        if self.bank is None:
            return None
        return (shares[..., None] * self.bank[which]).sum(-2)
