"""LoHa (FedPara, arXiv 2108.06098) as PEFT saves it, compiled to LowRank.

PEFT adds `x @ W.T` with W = (w1_a @ w1_b) * (w2_a @ w2_b) * alpha / r, the products taken element by element
(peft/tuners/loha/layer.py, get_delta_weight). That is exactly of rank r²: for each pair (p, q) the outer
product of the columns `w1_a[:, p] * w2_a[:, q]` and the rows `w1_b[p] * w2_b[q]`. The compiled rank and what
it costs are therefore r².
"""

from __future__ import annotations

from collections.abc import Generator

from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.peft.per_module import PREFIX, ModuleSettings
from polygraft.adapters.peft.targets import BAD_PATTERN, target_modules
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import LowRank
from polygraft.core.spec import BaseSpec

# `use_effective_conv2d` is for convolutions of more than one position; there are none among linear modules.
_NO_EFFECT = ("rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d")


def compile_loha(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a LoHa folder; yields between modules. Problems are noted in the reader."""
    settings = ModuleSettings(reader, "alpha")
    reader.ignore(*_NO_EFFECT)
    primitives: dict[str, LowRank] = {}
    for module in target_modules(reader, base):
        yield
        shape = base.linears[module]
        try:
            rank_and_alpha = settings.of(module)
        except BAD_PATTERN as error:
            settings.note_bad_pattern(error)
            break
        if rank_and_alpha is None:
            continue
        rank, alpha = rank_and_alpha
        columns, rows = (shape.out_features, rank), (rank, shape.in_features)
        w1_a = reader.take(f"{PREFIX}{module}.hada_w1_a", columns, wide=True)
        w1_b = reader.take(f"{PREFIX}{module}.hada_w1_b", rows, wide=True)
        w2_a = reader.take(f"{PREFIX}{module}.hada_w2_a", columns, wide=True)
        w2_b = reader.take(f"{PREFIX}{module}.hada_w2_b", rows, wide=True)
        if w1_a is None or w1_b is None or w2_a is None or w2_b is None:
            continue
        if not reader.has_room(rank * rank, rank * rank * (shape.in_features + shape.out_features)):
            continue
        a = (w1_b[:, None] * w2_b[None]).view(rank * rank, shape.in_features)
        b = (w1_a[:, :, None] * w2_a[:, None]).view(shape.out_features, rank * rank)
        scaling = alpha / rank
        kept_a, kept_b = reader.keep(a, module), reader.keep(b, module, scaling=scaling)
        if kept_a is not None and kept_b is not None:
            primitives[module] = LowRank(kept_a, kept_b, scaling=scaling)
    return AdapterWeights("loha", reader.parameters, by_module(low_rank=primitives))
