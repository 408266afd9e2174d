"""BEFT (arXiv 2509.15974) as PEFT saves it, compiled to LowRank of rank 0.

PEFT adds `beft_bias` to a module's output (peft/tuners/beft/layer.py, Linear.forward). A LowRank without a
product is its bias, which costs an addition.
"""

from __future__ import annotations

from collections.abc import Generator

from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.targets import target_modules
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import LowRank
from polygraft.core.spec import BaseSpec


def compile_beft(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a BEFT folder; yields between modules. Problems are noted in the reader."""
    reader.ignore("init_weights")
    primitives: dict[str, LowRank] = {}
    for module in target_modules(reader, base):
        yield
        shape = base.linears[module]
        bias = reader.take(f"{PREFIX}{module}.beft_bias", (1, shape.out_features))
        if bias is not None:
            a, b = bias.new_zeros(0, shape.in_features), bias.new_zeros(shape.out_features, 0)
            primitives[module] = LowRank(a, b, bias.float().flatten())
    return AdapterWeights("beft", reader.parameters, by_module(low_rank=primitives))
