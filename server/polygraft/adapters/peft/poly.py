"""Poly (arXiv 2202.13914) and multi-head routing (2211.03831) as PEFT saves them, compiled to LowRank.

A module has several LoRAs, its skills, and weighs them for each task, and each piece of its inputs and
outputs, by the logistic function of the task's logits, brought to a sum of 1 (peft/tuners/poly/layer.py,
Linear.forward; router.py, PolyRouter.forward). What a task adds is therefore one LoRA of the skills' rank. In
PEFT each request names its task. Here it names an adapter, so a folder holds one task; one with several is
refused rather than served as its first.
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
from polygraft.core.primitives import LowRank
from polygraft.core.spec import BaseSpec

_EPSILON = 1e-12


class Poly(ModuleKind):
    """Several LoRAs in a module, weighed for the task."""

    peft_type = "POLY"
    title = "Poly"
    paper = "2202.13914"
    rows = (side_path("low-rank side path, a folder for each task"),)
    training_only = ("init_weights",)

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._rank = reader.option("r", int, 8)
        self._tasks = reader.option("n_tasks", int, 1)
        self._skills = reader.option("n_skills", int, 4)
        self._splits = reader.option("n_splits", int, 1)
        self._router = reader.option("poly_type", str, "poly")

    def begin(self, targets: Sequence[str]) -> None:
        """Check the options."""
        numbers = self._rank, self._tasks, self._skills, self._splits
        require(
            self._router == "poly" and all(map(is_rank, numbers)),
            r=self._rank,
            n_tasks=self._tasks,
            n_skills=self._skills,
            n_splits=self._splits,
            poly_type=self._router,
        )
        if self._tasks > 1:
            raise OptionProblem(
                f"it holds {self._tasks} tasks, and an adapter is one; make a folder for each task t, with "
                "module_logits[t:t+1] of every module and n_tasks=1"
            )

    def change(self, module: TargetModule) -> ModuleChange:
        """Return the LoRA that the task's weights make of the skills."""
        rank, skills, splits = self._rank, self._skills, self._splits
        if module.inputs % splits or module.outputs % splits:
            raise Problem(f"n_splits {splits} doesn't divide {module.sizes}")
        logits, a, b = module.take_all(
            ("poly_router.module_logits", (self._tasks, splits * skills)),
            ("poly_lora_A", (splits, skills, module.inputs // splits, rank)),
            ("poly_lora_B", (splits, skills, rank, module.outputs // splits)),
        )
        weights = logits[0].sigmoid().view(splits, skills)
        weights = weights / (weights.sum(1, keepdim=True) + _EPSILON)
        mixed_a = torch.einsum("qs,qsir->rqi", weights, a).flatten(1)
        mixed_b = torch.einsum("qs,qsro->qor", weights, b).flatten(0, 1)
        return ModuleChange(LowRank(module.keep(mixed_a), module.keep(mixed_b), scaling=1 / rank))
