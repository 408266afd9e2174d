"""One product of a base's module, by rows and type: our linear operator against torch's own.

Weights come from memory: as many matrices take turns as no cache holds. Prints microseconds and GFLOP/s.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from polygraft.layers.linear.linear import LinearGroup, PackedLinear
from polygraft.layers.native.kernels import load_kernels

OUT, IN = 1536, 576  # gate or up of the default model
MATRICES = 60
ROWS = (1, 16, 64, 1024)
KINDS = (
    (torch.bfloat16, "none"),
    (torch.float32, "none"),
    (torch.bfloat16, "int8"),
    (torch.bfloat16, "nf4"),
)


def median_seconds(products: Sequence[Callable[[torch.Tensor], torch.Tensor]], rows: torch.Tensor) -> float:
    """Of one product, all matrices in turn; two turns, the first of them a warm-up."""
    seconds = []
    for turn in range(2):
        for product in products:
            started = time.perf_counter()
            product(rows)
            if turn:
                seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    kernels = load_kernels()
    if kernels is None:
        sys.exit("no C++ compiler")
    torch.manual_seed(0)
    print("| type | rows | ours, µs | GFLOP/s | torch, µs | GFLOP/s |\n|---|---|---|---|---|---|")
    with torch.inference_mode():
        for dtype, quantization in KINDS:
            plain = [nn.Linear(IN, OUT, bias=False, dtype=dtype) for _ in range(MATRICES)]
            for module in plain:
                nn.init.normal_(module.weight)  # as trained weights are
            ours = [PackedLinear(LinearGroup([m.weight], [None], kernels, quantization), 0) for m in plain]
            for count in ROWS:
                rows = (torch.randn(count, IN) ** 3).to(dtype)  # most small, few large, as in a model
                mine = median_seconds(ours, rows)
                cells = [f"{mine * 1e6:.0f}", f"{2e-9 * count * IN * OUT / mine:.0f}"]
                if quantization == "none":
                    theirs = median_seconds(plain, rows)
                    cells += [f"{theirs * 1e6:.0f}", f"{2e-9 * count * IN * OUT / theirs:.0f}"]
                else:
                    cells += ["", ""]
                name = str(dtype).removeprefix("torch.") if quantization == "none" else quantization
                print("| " + " | ".join([name, str(count), *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
