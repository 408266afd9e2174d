"""DeLoRA (arXiv 2503.18225) as PEFT saves it, compiled to LowRank.

PEFT adds `B diag(lambda / r / (|A_i| |B^i|)) A diag(w_norm)`, both norms at least 1e-4
(peft/tuners/delora/layer.py, DeloraLayer._compute_delta): the strength lambda is decoupled from the
directions. `w_norm`, the norms of the columns of the base's weight when training began, is in the file, so
the base's weights aren't needed.
"""

from __future__ import annotations

from collections.abc import Generator

from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.peft.per_module import PREFIX, ModuleSettings
from polygraft.adapters.peft.targets import BAD_PATTERN, target_modules
from polygraft.adapters.peft.trained_biases import take_trained_biases
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import LowRank
from polygraft.core.spec import BaseSpec

# The configuration's lambdas are those that training starts from.
_TRAINING_ONLY = ("delora_lambda", "lambda_pattern", "module_dropout", "init_weights")
_LEAST_NORM = 1e-4


def compile_delora(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a DeLoRA folder; yields between modules. Problems are noted in the reader."""
    settings = ModuleSettings(reader, None)
    reader.ignore(*_TRAINING_ONLY)
    primitives: dict[str, LowRank] = {}
    modules = target_modules(reader, base)
    biases, norms = take_trained_biases(reader, base, modules)
    for module in modules:
        yield
        shape = base.linears[module]
        try:
            rank_and_alpha = settings.of(module)
        except BAD_PATTERN as error:
            settings.note_bad_pattern(error)
            break
        if rank_and_alpha is None:
            continue
        rank, _ = rank_and_alpha
        a = reader.take(f"{PREFIX}{module}.delora_A", (rank, shape.in_features), wide=True)
        b = reader.take(f"{PREFIX}{module}.delora_B", (shape.out_features, rank), wide=True)
        strength = reader.take(f"{PREFIX}{module}.delora_lambda", (1,), wide=True)
        w_norm = reader.take(f"{PREFIX}{module}.delora_w_norm", (shape.in_features,), wide=True)
        if a is None or b is None or strength is None or w_norm is None:
            continue
        scaling = (
            strength / rank / (a.norm(dim=1).clamp(min=_LEAST_NORM) * b.norm(dim=0).clamp(min=_LEAST_NORM))
        )
        kept_a, kept_b = reader.keep(a * w_norm, module), reader.keep(b * scaling, module)
        if kept_a is not None and kept_b is not None:
            primitives[module] = LowRank(kept_a, kept_b)
    return AdapterWeights(
        "delora",
        reader.parameters,
        by_module(low_rank=primitives, bias=biases, norm=norms),
    )
