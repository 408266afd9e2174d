"""HiRA (ICLR 2025, openreview TwJrTz9cRS) as PEFT saves it, compiled to Dense.

PEFT adds the base's weight times `hira_B hira_A`, element by element (peft/tuners/hira/layer.py,
Linear.forward). That is of full rank, and it depends on the weights that are served: on a quantized base,
on what they stand for.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch

from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.targets import target_modules
from polygraft.core.adapter_weights import AdapterWeights, by_module
from polygraft.core.primitives import Dense
from polygraft.core.spec import BaseSpec


@dataclass(frozen=True, slots=True)
class Modulation(Dense):
    """The weight times 1 + B A, element by element.

    Args:
        a: float32 [rank, in_features]
        b: float32 [out_features, rank]
    """

    a: torch.Tensor
    b: torch.Tensor

    def fold(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """See `Dense`."""
        return weight * (1 + self.b[first : first + len(weight)] @ self.a)


def compile_hira(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a HiRA folder; yields between modules. Problems are noted in the reader."""
    # The rank is the file's: it changes nothing else, and PEFT doesn't follow its own rank_pattern.
    reader.ignore("r", "rank_pattern", "hira_dropout", "fan_in_fan_out", "init_weights")
    changes: dict[str, Dense] = {}
    for module in target_modules(reader, base):
        yield
        shape = base.linears[module]
        a = reader.take(f"{PREFIX}{module}.hira_A", (None, shape.in_features), wide=True)
        rank = None if a is None else len(a)
        b = reader.take(f"{PREFIX}{module}.hira_B", (shape.out_features, rank), wide=True)
        if a is not None and b is not None:
            changes[module] = Modulation(a, b)
    return AdapterWeights("hira", reader.parameters, by_module(dense=changes))
