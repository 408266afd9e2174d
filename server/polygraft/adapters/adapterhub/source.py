"""What the methods of one folder share while they are compiled, and what each of them gives."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch

from polygraft.adapters.adapterhub.layers import BaseLayers
from polygraft.adapters.adapterhub.options import Options
from polygraft.adapters.files.reader import FolderReader
from polygraft.core.primitives import Bottleneck, Coupling, LowRank, Prefix, Scale
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

    def take_any(
        self, names: Sequence[str], shape: tuple[int | None, ...], *, wide: bool = False
    ) -> torch.Tensor | None:
        """Take a tensor that the library saves under several names, from those that are there.

        Copies that differ are a problem, since the library would take whichever comes last.
        """
        there = [name for name in names if self.reader.holds(name)]
        taken = [self.reader.take(name, shape, wide=wide) for name in there or names[:1]]
        whole = [tensor for tensor in taken if tensor is not None]
        if len(whole) < len(taken):
            return None
        if any(not torch.equal(whole[0], other) for other in whole[1:]):
            self.reader.problems.append(f"tensors {there[0]} and {there[1]} must be the same and differ")
            return None
        return whole[0]


@dataclass(slots=True)
class Parts:
    """What one method, or all of a union, adds to the base; as in `AdapterWeights`."""

    kind: str
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    scales: dict[str, Scale] = field(default_factory=dict)
    bottlenecks: dict[str, Bottleneck] = field(default_factory=dict)
    coupling: Coupling | None = None
    prefix: Prefix | None = None


Method = Callable[[Source, Options], Generator[None, None, Parts]]
