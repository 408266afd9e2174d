"""What the methods of one folder share while they are compiled, and what each of them gives."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch

from polygraft.adapters.adapterhub.layers import BaseLayers
from polygraft.adapters.adapterhub.options import Options
from polygraft.adapters.files.problems import Problem
from polygraft.adapters.files.reader import FolderReader, Shape
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import Prefix
from polygraft.core.residual_primitives import Bottleneck, Coupling
from polygraft.core.spec import BaseSpec


@dataclass(frozen=True, slots=True)
class Source:
    """One folder.

    Args:
        name: the adapter's, which is part of its tensors' names.
        old_activations: it is older than the library's present names of activations.
        unscaled_lora: its LoRA was trained when the library forgot to scale it.
        inverts: the model class that it was saved from inverts a coupling before its head.
    """

    reader: FolderReader
    base: BaseSpec
    layers: BaseLayers
    name: str
    old_activations: bool
    unscaled_lora: bool
    inverts: bool

    def take_any(self, names: Sequence[str], shape: Shape, *, wide: bool = False) -> torch.Tensor:
        """Take a tensor that the library may save under several names.

        Raises:
            Problem: it is missing, or its copies differ: the library would take whichever comes last.
        """
        held = [name for name in names if self.reader.holds(name)] or names[:1]
        first, *others = self.reader.take_all([(name, shape) for name in held], wide=wide)
        if any(not torch.equal(first, other) for other in others):
            raise Problem(f"tensors {held[0]} and {held[1]} must be the same and differ")
        return first


@dataclass(slots=True)
class Parts:
    """What one method, or all of a union, adds to the base; as in `AdapterWeights`."""

    kind: str
    modules: dict[str, ModuleChange] = field(default_factory=dict)
    bottlenecks: dict[str, Bottleneck] = field(default_factory=dict)
    coupling: Coupling | None = None
    prefix: Prefix | None = None


Method = Callable[[Source, Options], Generator[None, None, Parts]]
