"""AdaLoRA (arXiv 2303.10512) as PEFT saves it, compiled to LowRank.

PEFT adds `x @ (lora_A * lora_E).T @ lora_B.T * scaling / (ranknum + 1e-5)` (peft/tuners/adalora/layer.py,
SVDLinear.forward). Training lowers ranks by masking, and saving drops what `rank_pattern` masks: a module's
rank is what is left, 0 included (peft/tuners/adalora/model.py, resize_state_dict_by_rank_pattern). `ranknum`
isn't saved and doesn't follow: it is `init_r` after loading as it was in training
(resize_modules_by_rank_pattern). A module of rank 0 adds nothing and gets no primitive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from polygraft.adapters.files.numbers import is_alpha, is_rank
from polygraft.adapters.files.problems import require
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.files.shown import shown
from polygraft.adapters.kind import side_path
from polygraft.adapters.peft.lora import TRAINING_ONLY, UNSERVED
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.adapters.peft.trainable_tokens import take_trainable_tokens
from polygraft.core.adapter_weights import AdapterWeights, ModuleChange
from polygraft.core.spec import BaseSpec

_SCHEDULE = ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
_EPSILON = 1e-5


class AdaLora(ModuleKind):
    """A LoRA with a factor for each rank, whose ranks differ by module."""

    peft_type = "ADALORA"
    title = "AdaLoRA"
    paper = "2303.10512"
    rows = (side_path(cost="rank × rows, nothing where the rank is 0"),)
    # It inherits LoRA's r but doesn't use it, and all its initialisations leave the base alone.
    training_only = ("r", "init_lora_weights", *TRAINING_ONLY, *_SCHEDULE)
    unserved = (
        *UNSERVED, "alora_invocation_tokens", "alpha_pattern", "lora_bias", "target_parameters", "use_dora",
        "use_rslora",
    )  # fmt: skip
    trains_biases = True
    ties = True

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._initial = reader.option("init_r", int, 12)
        self._alpha = reader.option("lora_alpha", (int, float), 8)
        self._pattern = reader.option("rank_pattern", dict, {})

    def targets(self) -> Sequence[str]:
        """Return the modules to compile, and take the trained tokens."""
        targets = super().targets()
        self._token_rows = take_trainable_tokens(self.reader, self.base, targets)
        return targets

    def begin(self, targets: Sequence[str]) -> None:
        """Check the options, and read each module's rank from its mask."""
        require(
            is_rank(self._initial) and is_alpha(self._alpha), init_r=self._initial, lora_alpha=self._alpha
        )
        self._ranks = dict.fromkeys(targets, self._initial)
        masks = {f"{module}.lora_E": module for module in targets}
        for key, mask in self._pattern.items():
            if not targets:
                break
            if key not in masks:
                problem = f"rank_pattern has {shown(key)}, which is no targeted module's lora_E"
            elif not self._is_mask(mask):
                problem = f"rank_pattern of {key} isn't a list of {self._initial} booleans: {shown(mask)}"
            else:
                self._ranks[masks[key]] = sum(mask)
                continue
            self.reader.problems.append(problem)

    def _is_mask(self, mask: object) -> bool:
        return (
            isinstance(mask, list)
            and len(mask) == self._initial
            and all(isinstance(kept, bool) for kept in mask)
        )

    def change(self, module: TargetModule) -> ModuleChange | None:
        """Return A with the factors folded in, and B; None for rank 0."""
        rank = self._ranks[module.name]
        a, b, e = module.take_all(
            ("lora_A", (rank, module.inputs)), ("lora_B", (module.outputs, rank)), ("lora_E", (rank, 1))
        )
        if rank == 0:
            return None
        scaling = (self._alpha if self._alpha > 0 else rank) / (self._initial + _EPSILON)
        return module.low_rank(a * e, b, scaling)

    def weights(self, modules: Mapping[str, ModuleChange]) -> AdapterWeights:
        """Return the adapter, with its trained tokens."""
        return replace(super().weights(modules), token_rows=self._token_rows)
