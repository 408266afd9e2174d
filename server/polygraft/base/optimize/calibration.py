"""Which kernel multiplies unquantized weights: the faster one on this machine, measured at load."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from polygraft.layers.linear.linear import LinearGroup, PackedLinear
from polygraft.layers.linear.onednn_linear import OneDnnLinear, gains_by_onednn
from polygraft.layers.native.kernels import Kernels

OURS, ONEDNN = "ours", "oneDNN"
ROWS = (1, 16, 128)
"""A lone decode, a full one, a chunk of a prompt."""
MARGIN = 0.8
"""Share of our time that oneDNN's products may take to be chosen: with them side paths are a second pass, and
no decoder layer is a single operator."""
_LEAST_WEIGHTS = 2**18  # smaller products are over before a clock can tell them apart
_MATRICES = 6  # take turns, so that not all weights come from the nearest cache
_TURNS = 5


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured for weights of one type.

    Args:
        microseconds: of a product, by kernel and rows; empty where there was no choice.
    """

    kernel: str
    microseconds: Mapping[str, Mapping[int, float]]

    def describe(self) -> str:
        """The kernel and what was measured, in words."""
        name = "Polygraft's operators" if self.kernel == OURS else "oneDNN"
        rows = f"{ROWS[0]}, {ROWS[1]} and {ROWS[2]} rows"
        taken = "; ".join(
            f"{kernel} {', '.join(f'{by_rows[count]:.0f}' for count in ROWS)}"
            for kernel, by_rows in self.microseconds.items()
        )
        return f"{name} (µs for {rows}: {taken})" if taken else name


def calibrate(weight: torch.Tensor, kernels: Kernels | None) -> Calibration:
    """Choose for weights like this one [out_features, in_features]; takes some tenths of a second."""
    if kernels is None:
        return Calibration(ONEDNN, {})
    if not gains_by_onednn(weight) or weight.numel() < _LEAST_WEIGHTS:
        return Calibration(OURS, {})
    products: dict[str, list[nn.Module]] = {
        OURS: [PackedLinear(LinearGroup([weight], [None], kernels), 0) for _ in range(_MATRICES)],
        ONEDNN: [OneDnnLinear(weight, None) for _ in range(_MATRICES)],
    }
    microseconds: dict[str, dict[int, float]] = {name: {} for name in products}
    for rows in ROWS:
        x = torch.ones(1, rows, weight.shape[1], dtype=weight.dtype)
        seconds: dict[str, list[float]] = {name: [] for name in products}
        for turn in range(_TURNS + 1):
            for name, modules in products.items():
                started = time.perf_counter()
                for module in modules:
                    module(x)
                if turn:
                    seconds[name].append(time.perf_counter() - started)
        for name, taken in seconds.items():
            microseconds[name][rows] = 1e6 * statistics.median(taken) / _MATRICES
    ratio = math.prod(microseconds[ONEDNN][rows] / microseconds[OURS][rows] for rows in ROWS) ** (
        1 / len(ROWS)
    )
    return Calibration(ONEDNN if ratio < MARGIN else OURS, microseconds)
