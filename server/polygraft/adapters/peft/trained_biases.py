"""The option `bias`: biases of the base that were trained with an adapter and replace the base's own.

PEFT saves "all" of the model's, or those of the modules that the kind adapts, and loads them in the place of
the base's (peft/tuners/tuners_utils.py, `_get_learnable_bias_state_dict`).
"""

from __future__ import annotations

from collections.abc import Collection

from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.files.shown import shown
from polygraft.adapters.peft.module import PREFIX
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import NormWeights
from polygraft.core.spec import BaseSpec


def take_trained_biases(
    reader: FolderReader, base: BaseSpec, targets: Collection[str]
) -> dict[str, ModuleChange]:
    """Take the option and its tensors, those of linear modules and of norms.

    Args:
        targets: the modules that the kind adapts.
    """
    which = reader.option("bias", str, "none")
    changes: dict[str, ModuleChange] = {}
    if which == "none":
        return changes
    every = which == "all"
    if not every and not which.endswith("_only"):
        reader.problems.append(f"bias {shown(which)} means nothing to PEFT")
        return changes
    for module, shape in base.linears.items():
        adapted = module in targets
        if shape.has_bias and (every or adapted):
            name = f"{PREFIX}{module}.base_layer.bias" if adapted else f"{PREFIX}{module}.bias"
            with reader.noting():
                changes[module] = ModuleChange(bias=reader.take(name, (shape.out_features,)))
    for module, norm in base.norms.items():
        if every and norm.has_bias:
            name = f"{PREFIX}{module}.bias"
            with reader.noting():
                changes[module] = ModuleChange(norm=NormWeights(None, reader.take(name, (norm.width,))))
    return changes
