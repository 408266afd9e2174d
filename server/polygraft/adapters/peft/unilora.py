"""Uni-LoRA (arXiv 2506.00799) as PEFT saves it, compiled to LowRank.

Every element of every module's A and B is one of the few in `unilora_theta_d`, over the root of how often
that one is used (peft/tuners/unilora/layer.py, Linear._get_lora_matrices). Which one is in the file, or
with `save_indices=False` drawn again from `proj_seed` in the order of the modules
(peft/tuners/unilora/model.py, generate_index); the draw is NumPy's, which doesn't promise the same one in
every version.

Compiled, every module has weights of its own: a small file becomes as large as a LoRA of its rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from polygraft.adapters.files.numbers import is_rank
from polygraft.adapters.files.problems import require
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.kind import side_path
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.spec import BaseSpec

Factor = tuple[torch.Tensor, torch.Tensor]
"""Indices into theta and what each is multiplied by, both of the factor's shape."""
Shapes = tuple[tuple[int, int], tuple[int, int]]
"""Of A and B."""


class UniLora(ModuleKind):
    """All elements of all A and B, taken from one short vector."""

    peft_type = "UNILORA"
    title = "Uni-LoRA"
    paper = "2506.00799"
    rows = (side_path(),)
    training_only = ("unilora_dropout", "fan_in_fan_out", "init_theta_d_bound", "init_weights")
    trains_biases = True

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._rank = reader.option("r", int, 4)
        self._length = reader.option("theta_d_length", int, 256)
        self._seed = reader.option("proj_seed", int, 42)
        self._saved = reader.option("save_indices", bool, False)
        self._drawn: Iterator[Factor] = iter(())

    def begin(self, targets: Sequence[str]) -> None:
        """Take the vector, and draw the indices that aren't saved."""
        valid = is_rank(self._rank) and is_rank(self._length) and self._seed >= 0
        require(valid, r=self._rank, theta_d_length=self._length, proj_seed=self._seed)
        self._theta = self.reader.take("base_model.unilora_theta_d", (self._length,), wide=True)
        shapes = [self.base.linears[name] for name in targets]
        sizes = [self._rank * (shape.in_features + shape.out_features) for shape in shapes]
        # Before they are drawn: a file of a few numbers must not fill the memory.
        self.reader.need_room(self._rank, sum(sizes))
        if targets and not self._saved:
            self._drawn = _drawn(sizes, self._length, self._seed)

    def change(self, module: TargetModule) -> ModuleChange:
        """Return the module's A and B."""
        shapes = (self._rank, module.inputs), (module.outputs, self._rank)
        factors = self._take_factors(module, shapes) if self._saved else _cut(next(self._drawn), shapes)
        (which_a, scale_a), (which_b, scale_b) = factors
        return module.low_rank(self._theta[which_a] * scale_a, self._theta[which_b] * scale_b)

    def _take_factors(self, module: TargetModule, shapes: Shapes) -> tuple[Factor, Factor]:
        """Take A's and B's from the file. Raises Problem."""
        which_a, which_b = (
            module.take_indices(f"unilora_indices_{letter}", shape, self._length)
            for letter, shape in zip("AB", shapes, strict=True)
        )
        scale_a, scale_b = module.take_all(("unilora_scales_A", shapes[0]), ("unilora_scales_B", shapes[1]))
        return (which_a, scale_a), (which_b, scale_b)


def _drawn(sizes: Sequence[int], length: int, seed: int) -> Iterator[Factor]:
    """Each module's, drawn as PEFT does: each index equally often, as far as that goes, in a random order."""
    often, rest = divmod(sum(sizes), length)
    generator = np.random.default_rng(seed)
    which = np.repeat(np.arange(length), often)
    if rest:
        which = np.concatenate([which, generator.choice(length, size=rest, replace=False)])
    generator.shuffle(which)
    indices = torch.from_numpy(which)
    scale = torch.bincount(indices, minlength=length).float().rsqrt()
    for own in torch.split(indices, list(sizes)):
        yield own, scale[own]


def _cut(both: Factor, shapes: Shapes) -> tuple[Factor, Factor]:
    """A module's into A's and B's."""
    first = shapes[0][0] * shapes[0][1]
    a = both[0][:first].view(shapes[0]), both[1][:first].view(shapes[0])
    b = both[0][first:].view(shapes[1]), both[1][first:].view(shapes[1])
    return a, b
