"""FourierFT (arXiv 2405.03003) as PEFT saves it, compiled to Dense.

PEFT adds the real part of the inverse Fourier transform, in two dimensions, of a matrix with `n_frequency`
entries, times `scaling` (peft/tuners/fourierft/layer.py, get_delta_weight). Where the entries are isn't
saved: it is drawn again from `random_loc_seed` and the module's shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polygraft.adapters.files.numbers import is_alpha, is_rank
from polygraft.adapters.files.patterns import Form
from polygraft.adapters.files.problems import Problem, require
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.files.shown import shown
from polygraft.adapters.kind import merged_copy
from polygraft.adapters.peft.module import TargetModule
from polygraft.adapters.peft.module_kind import ModuleKind
from polygraft.adapters.peft.per_module import PatternedOption
from polygraft.adapters.peft.projections import KEYS
from polygraft.adapters.peft.sparse import RandomPlaces
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import Dense
from polygraft.core.spec import BaseSpec


@dataclass(frozen=True, slots=True)
class Spectrum(Dense):
    """The weight plus the inverse transform of a few frequencies.

    Args:
        values: float32 [frequencies], with all factors in them.
        rows, columns: int64 [frequencies], where they are.
        outputs: of the module, the first dimension that is transformed.
    """

    values: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    outputs: int

    def fold(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """See `Dense`: across rows by the definition, for these rows alone; along each of them by an FFT."""
        at = torch.arange(first, first + len(weight), device=weight.device)
        angle = (at[:, None] * self.rows % self.outputs).float() * (2 * math.pi / self.outputs)
        waves = torch.complex(self.values * angle.cos(), self.values * angle.sin())
        half = waves.new_zeros(weight.shape).index_add_(1, self.columns, waves)
        added: torch.Tensor = torch.fft.ifft(half, dim=1).real
        return weight + added


class FourierFt(ModuleKind):
    """A few frequencies of the weight's Fourier transform."""

    peft_type = "FOURIERFT"
    title = "FourierFT"
    paper = "2405.03003"
    rows = (merged_copy("a few frequencies"),)
    training_only = ("fan_in_fan_out", "init_weights")
    trains_biases = True

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        count = reader.option("n_frequency", int, 1000)
        self._counts = PatternedOption(reader, "n_frequency_pattern", Form.ENDING, count)
        self._scaling = reader.option("scaling", (int, float), 150.0)
        self._seed = reader.option("random_loc_seed", int, 777)

    def begin(self, targets: Sequence[str]) -> None:
        """Check the options."""
        valid = is_alpha(self._scaling) and self._seed in KEYS
        require(valid, scaling=self._scaling, random_loc_seed=self._seed)
        self._places = RandomPlaces(self._seed)

    def change(self, module: TargetModule) -> ModuleChange:
        """Return the frequencies and their places."""
        count = self._counts.of(module.name)
        if not is_rank(count) or count > module.inputs * module.outputs:
            raise Problem(f"n_frequency {shown(count)} for {module.name} isn't valid")
        values = module.take("fourierft_spectrum", (count,)) * (self._scaling / module.outputs)
        rows, columns = self._places.of(count, module.outputs, module.inputs)
        return ModuleChange(dense=Spectrum(values, rows, columns, module.outputs))
