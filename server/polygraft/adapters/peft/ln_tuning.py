"""LayerNorm tuning (arXiv 2312.11420) as PEFT saves it, compiled to NormWeights.

A copy of each targeted module was trained and takes its place (peft/tuners/ln_tuning/layer.py).
"""

from __future__ import annotations

from collections.abc import Generator

from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.saved_modules import take_norm
from polygraft.adapters.peft.targets import target_modules
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import NormWeights
from polygraft.core.spec import BaseSpec


def compile_ln_tuning(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile an LN-tuning folder; yields between modules. Problems are noted in the reader."""
    norms: dict[str, NormWeights] = {}
    for module in target_modules(reader, base, also=base.norms):
        yield
        if module not in base.norms:
            reader.problems.append(f"target {module} is no norm, which this kind is served on alone")
            continue
        norm = take_norm(reader, base, module, f"{PREFIX}{module}.ln_tuning_layers")
        if norm is not None:
            norms[module] = norm
    return AdapterWeights("ln_tuning", reader.parameters, by_module(norm=norms))
