"""VB-LoRA (arXiv 2405.15179) as PEFT saves it, compiled to LowRank.

Rows of A and columns of B are put together from pieces, each a mixture of the `topk` likeliest vectors of a
bank that all modules share; the weights are the softmax of their logits (peft/tuners/vblora/layer.py,
Linear._get_low_rank_matrix). With `save_only_topk_weights` the file holds which vectors these are, and all
weights but the last, which makes up for the rest (peft/tuners/vblora/model.py,
_remap_adapter_state_dict_for_load).

Compiled, every module has weights of its own: a small file becomes as large as a LoRA of its rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polygraft.adapters.files.numbers import is_rank
from polygraft.adapters.files.problems import OptionProblem, Problem, require
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.kind import side_path
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.spec import BaseSpec

_ROUNDING = 1e-2  # how far weights that were saved in sixteen bits may be from adding up to one


class VbLora(ModuleKind):
    """Rows of A and columns of B, mixed from vectors of a bank that all modules share."""

    peft_type = "VBLORA"
    title = "VB-LoRA"
    paper = "2405.15179"
    rows = (side_path(),)
    training_only = ("vblora_dropout", "fan_in_fan_out", "init_vector_bank_bound", "init_logits_std")
    trains_biases = True

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._rank = reader.option("r", int, 4)
        self._vectors = reader.option("num_vectors", int, 256)
        self._length = reader.option("vector_length", int, 256)
        self._top = reader.option("topk", int, 2)
        self._only_top = reader.option("save_only_topk_weights", bool, False)

    def begin(self, targets: Sequence[str]) -> None:
        """Check the options, and take the bank."""
        numbers = self._rank, self._vectors, self._length, self._top
        valid = all(map(is_rank, numbers)) and self._top <= self._vectors
        require(valid, r=self._rank, num_vectors=self._vectors, vector_length=self._length, topk=self._top)
        for name in targets:
            linear = self.base.linears[name]
            if linear.in_features % self._length or linear.out_features % self._length:
                raise OptionProblem(
                    f"vector_length {self._length} doesn't divide {name}'s {linear.in_features} inputs and "
                    f"{linear.out_features} outputs"
                )
        shape = self._vectors, self._length
        self._bank = self.reader.take("base_model.vblora_vector_bank", shape, wide=True)

    def change(self, module: TargetModule) -> ModuleChange:
        """Return the module's A and B."""
        rank, length = self._rank, self._length
        module.need_room(rank)
        rows = self._mixed(module, "vblora_logits_A", rank, module.inputs // length)
        columns = self._mixed(module, "vblora_logits_B", module.outputs // length, rank)
        return module.low_rank(rows.flatten(1), columns.transpose(1, 2).flatten(0, 1))

    def _mixed(self, module: TargetModule, name: str, rows: int, columns: int) -> torch.Tensor:
        """Return mixed vectors [rows, columns, length] from logits, or from what is saved instead."""
        if self._only_top:
            shape = rows, columns, self._top
            which = module.take_indices(f"{name}_topk_indices", shape, self._vectors, distinct=True)
            shares = module.take(f"{name}_topk_weights", (rows, columns, self._top - 1))
            shares = torch.cat([shares, 1 - shares.sum(-1, keepdim=True)], -1)
            if (
                shares.numel()
                and not -_ROUNDING <= float(shares.min()) <= float(shares.max()) <= 1 + _ROUNDING
            ):
                tensor = f"{module.prefix}{name}_topk_weights"
                raise Problem(f"tensor {tensor} holds weights that don't add up to one")
            shares = shares.clamp(min=0)
        else:
            best, which = module.take(name, (rows, columns, self._vectors)).topk(self._top, dim=-1)
            shares = best.softmax(-1)
        return (shares[..., None] * self._bank[which]).sum(-2)
