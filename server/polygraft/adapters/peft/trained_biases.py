"""The option `bias`: the base's biases, trained beside an adapter, compiled to biases and NormWeights.

PEFT saves "all" of the model's, or those of the modules that the kind adapts, and loads them in the place of
the base's (peft/tuners/tuners_utils.py, `_get_learnable_bias_state_dict`).
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.core.primitives import NormWeights
from polygraft.core.spec import BaseSpec


def take_trained_biases(
    reader: FolderReader, base: BaseSpec, targets: Collection[str]
) -> tuple[dict[str, torch.Tensor], dict[str, NormWeights]]:
    """Take the option and its tensors, by the names of linear modules and of norms.

    Args:
        targets: the modules that the kind adapts.
    """
    which = reader.option("bias", str, "none")
    biases: dict[str, torch.Tensor] = {}
    norms: dict[str, NormWeights] = {}
    if which == "none":
        return biases, norms
    every = which == "all"
    if not every and not which.endswith("_only"):
        reader.problems.append(f"bias {shown(which)} means nothing to PEFT")
        return biases, norms
    for module, shape in base.linears.items():
        adapted = module in targets
        if not shape.has_bias or not (every or adapted):
            continue
        name = f"{PREFIX}{module}.base_layer.bias" if adapted else f"{PREFIX}{module}.bias"
        values = reader.take(name, (shape.out_features,))
        if values is not None:
            biases[module] = values
    if every:
        for module, norm in base.norms.items():
            bias = reader.take(f"{PREFIX}{module}.bias", (norm.width,)) if norm.has_bias else None
            if bias is not None:
                norms[module] = NormWeights(None, bias)
    return biases, norms
