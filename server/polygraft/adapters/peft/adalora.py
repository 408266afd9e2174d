"""AdaLoRA (arXiv 2303.10512) as PEFT saves it, compiled to LowRank.

PEFT adds `x @ (lora_A * lora_E).T @ lora_B.T * scaling / (ranknum + 1e-5)` (peft/tuners/adalora/layer.py,
SVDLinear.forward). Training lowers ranks by masking, and saving drops what `rank_pattern` masks: a module's
rank is what is left, 0 included (peft/tuners/adalora/model.py, resize_state_dict_by_rank_pattern). `ranknum`
isn't saved and doesn't follow: it is `init_r` after loading as it was in training
(resize_modules_by_rank_pattern). A module of rank 0 adds nothing and gets no primitive.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from polygraft.adapters.files.numbers import is_alpha, is_rank
from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.lora import TRAINING_ONLY
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.targets import target_modules
from polygraft.adapters.peft.trainable_tokens import take_trainable_tokens
from polygraft.adapters.peft.trained_biases import take_trained_biases
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import LowRank
from polygraft.core.spec import BaseSpec

_SCHEDULE = ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
_EPSILON = 1e-5


def compile_adalora(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile an AdaLoRA folder; yields between modules. Problems are noted in the reader."""
    initial = reader.option("init_r", int, 12)
    alpha = reader.option("lora_alpha", (int, float), 8)
    pattern = reader.option("rank_pattern", dict, {})
    # It inherits LoRA's r but doesn't use it, and all its initialisations leave the base alone.
    reader.ignore("r", "init_lora_weights", *TRAINING_ONLY, *_SCHEDULE)
    modules = target_modules(reader, base)
    biases, norms = take_trained_biases(reader, base, modules)
    token_rows = take_trainable_tokens(reader, base, modules)
    if not is_rank(initial) or not is_alpha(alpha):
        reader.problems.append(f"init_r {shown(initial)} with alpha {shown(alpha)} makes no sense")
        modules = []
    ranks = _ranks(reader, modules, initial, pattern)
    primitives: dict[str, LowRank] = {}
    for module, rank in ranks.items():
        yield
        shape = base.linears[module]
        a = reader.take(f"{PREFIX}{module}.lora_A", (rank, shape.in_features), wide=True)
        b = reader.take(f"{PREFIX}{module}.lora_B", (shape.out_features, rank), wide=True)
        e = reader.take(f"{PREFIX}{module}.lora_E", (rank, 1), wide=True)
        if a is None or b is None or e is None or rank == 0:
            continue
        scaling = (alpha if alpha > 0 else rank) / (initial + _EPSILON)
        # E has a factor per rank and is folded into A, in float32.
        kept_a, kept_b = reader.keep(a * e, module), reader.keep(b, module, scaling=scaling)
        if kept_a is not None and kept_b is not None:
            primitives[module] = LowRank(kept_a, kept_b, scaling=scaling)
    return AdapterWeights(
        "adalora",
        reader.parameters,
        by_module(low_rank=primitives, bias=biases, norm=norms),
        token_rows=token_rows,
    )


def _ranks(
    reader: FolderReader, modules: list[str], initial: int, pattern: Mapping[str, Any]
) -> dict[str, int]:
    """Each module's rank: what its mask leaves of the initial one. Modules with a mask that is none are noted
    and left out."""
    masks = {f"{module}.lora_E": module for module in modules}
    ranks = dict.fromkeys(modules, initial)
    for key, mask in pattern.items():
        if modules and key not in masks:
            reader.problems.append(f"rank_pattern has {shown(key)}, which is no targeted module's lora_E")
        elif key not in masks:
            continue
        elif isinstance(mask, list) and len(mask) == initial and all(isinstance(kept, bool) for kept in mask):
            ranks[masks[key]] = sum(mask)
        else:
            reader.problems.append(f"rank_pattern of {key} isn't a list of {initial} booleans: {shown(mask)}")
            del ranks[masks[key]]
    return ranks
