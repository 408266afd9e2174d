"""FourierFT (arXiv 2405.03003) as PEFT saves it, compiled to Dense.

PEFT adds the real part of the inverse Fourier transform, in two dimensions, of a matrix with `n_frequency`
entries, times `scaling` (peft/tuners/fourierft/layer.py, get_delta_weight). Where the entries are isn't
saved: it is drawn again from `random_loc_seed` and the module's shape.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch

from polygraft.adapters.files.numbers import is_alpha, is_rank
from polygraft.adapters.files.patterns import Form, OptionByModule
from polygraft.adapters.files.reader import FolderReader, shown
from polygraft.adapters.peft.per_module import PREFIX
from polygraft.adapters.peft.projections import KEYS
from polygraft.adapters.peft.sparse import RandomPlaces
from polygraft.adapters.peft.targets import BAD_PATTERN, target_modules
from polygraft.adapters.peft.trained_biases import take_trained_biases
from polygraft.core.adapter_weights import AdapterWeights, by_module
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


def compile_fourierft(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a FourierFT folder; yields between modules. Problems are noted in the reader."""
    count: Any = reader.option("n_frequency", int, 1000)
    counts = OptionByModule(reader.option("n_frequency_pattern", dict, {}), Form.ENDING, reader.matching)
    scaling = reader.option("scaling", (int, float), 150.0)
    seed = reader.option("random_loc_seed", int, 777)
    reader.ignore("fan_in_fan_out", "init_weights")
    modules = target_modules(reader, base)
    biases, norms = take_trained_biases(reader, base, modules)
    if not is_alpha(scaling) or seed not in KEYS:
        reader.problems.append(f"scaling {shown(scaling)} with random_loc_seed {shown(seed)} makes no sense")
        modules = []
    places = RandomPlaces(seed)
    changes: dict[str, Dense] = {}
    for module in modules:
        yield
        shape = base.linears[module]
        try:
            several = counts.of(module, count)
        except BAD_PATTERN as error:
            reader.problems.append(
                f"n_frequency_pattern is not a regular expression that can be matched: {error}"
            )
            break
        if not is_rank(several) or several > shape.in_features * shape.out_features:
            reader.problems.append(f"n_frequency {shown(several)} for {module} makes no sense")
            continue
        spectrum = reader.take(f"{PREFIX}{module}.fourierft_spectrum", (several,), wide=True)
        if spectrum is None:
            continue
        rows, columns = places.of(several, shape.out_features, shape.in_features)
        changes[module] = Spectrum(
            spectrum * (scaling / shape.out_features), rows, columns, shape.out_features
        )
    return AdapterWeights("fourierft", reader.parameters, by_module(dense=changes, bias=biases, norm=norms))
