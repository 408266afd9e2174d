"""Poly (arXiv 2202.13914) and multi-head routing (2211.03831) as PEFT saves them, compiled to LowRank.

A module has several LoRAs, its skills, and weighs them for each task, and each piece of its inputs and
outputs, by the logistic function of the task's logits, brought to a sum of 1 (peft/tuners/poly/layer.py,
Linear.forward; router.py, PolyRouter.forward). What a task adds is therefore one LoRA of the skills' rank. In
PEFT each request names its task. Here it names an adapter, so a folder holds one task; one with several is
refused rather than served as its first.
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from polygraft.adapters.files.numbers import is_rank
from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.targets import target_modules
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import LowRank
from polygraft.core.spec import BaseSpec

_EPSILON = 1e-12


def compile_poly(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a Poly folder of one task; yields between modules. Problems are noted in the reader."""
    rank = reader.option("r", int, 8)
    tasks = reader.option("n_tasks", int, 1)
    skills = reader.option("n_skills", int, 4)
    splits = reader.option("n_splits", int, 1)
    router = reader.option("poly_type", str, "poly")
    reader.ignore("init_weights")
    modules = target_modules(reader, base)
    if router != "poly" or not all(map(is_rank, (rank, tasks, skills, splits))):
        reader.problems.append(
            f"r {shown(rank)} with n_tasks {shown(tasks)}, n_skills {shown(skills)}, "
            f"n_splits {shown(splits)} and poly_type {shown(router)} makes no sense"
        )
        modules = []
    elif tasks > 1:
        reader.problems.append(
            f"it holds {tasks} tasks, and an adapter is one; make a folder for each task t, with "
            "module_logits[t:t+1] of every module and n_tasks=1"
        )
    low_rank: dict[str, LowRank] = {}
    for module in modules:
        yield
        shape = base.linears[module]
        if shape.in_features % splits or shape.out_features % splits:
            reader.problems.append(
                f"n_splits {splits} doesn't divide {module}'s {shape.in_features} inputs and "
                f"{shape.out_features} outputs"
            )
            continue
        into, out = shape.in_features // splits, shape.out_features // splits
        logits = reader.take(
            f"{PREFIX}{module}.poly_router.module_logits", (tasks, splits * skills), wide=True
        )
        a = reader.take(f"{PREFIX}{module}.poly_lora_A", (splits, skills, into, rank), wide=True)
        b = reader.take(f"{PREFIX}{module}.poly_lora_B", (splits, skills, rank, out), wide=True)
        if logits is None or a is None or b is None:
            continue
        weights = logits[0].sigmoid().view(splits, skills)
        weights = weights / (weights.sum(1, keepdim=True) + _EPSILON)
        mixed_a = torch.einsum("qs,qsir->rqi", weights, a).flatten(1)
        mixed_b = torch.einsum("qs,qsro->qor", weights, b).flatten(0, 1)
        kept_a, kept_b = reader.keep(mixed_a, module), reader.keep(mixed_b, module)
        if kept_a is not None and kept_b is not None:
            low_rank[module] = LowRank(kept_a, kept_b, scaling=1 / rank)
    return AdapterWeights("poly", reader.parameters, by_module(low_rank=low_rank))
