"""How near a step comes to what the machine can do, and where its time goes; in process."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.suite.experiment import Experiment, Row
from polygraft.base.optimize.packing import weight_bytes
from polygraft.config import ServerConfig
from polygraft.engine.load_engine import load_engine
from polygraft.layers.linear.linear import LinearGroup, PackedLinear
from polygraft.layers.native.kernels import load_kernels
from polygraft_types.requests import Request, StoppingParams

STEPS = 24
MANY_ROWS = 1024
WIDTH_IN, WIDTH_OUT = 576, 1536  # gate or up of the default model
PLANS = ((1, 64, "decode, 1 row"), (16, 64, "decode, 16 rows"), (1, 512, "prefill, 512 rows"))
CONFIGS = {"bfloat16": ("none", "bfloat16"), "int8": ("int8", "bfloat16")}


def best_seconds(run: Callable[[], object], times: int) -> float:
    """The shortest of several runs, since a limit is what nothing disturbs."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def bandwidth() -> float:
    """Bytes a second that all threads read."""
    x = torch.ones(2**27, dtype=torch.int64)
    return x.nbytes / best_seconds(x.sum, 5)


def products_per_second(quantization: Any) -> float:
    """Multiplications and additions a second of our product with many rows, where it is fastest."""
    kernels = load_kernels()
    assert kernels is not None, "needs the C++ operators"
    weight = torch.randn(WIDTH_OUT, WIDTH_IN).bfloat16()
    product = PackedLinear(LinearGroup([weight], [None], kernels, quantization), 0)
    x = torch.randn(MANY_ROWS, WIDTH_IN).bfloat16()
    return 2 * MANY_ROWS * weight.numel() / best_seconds(lambda: product(x), 10)


class Timed:
    """An engine whose parts note how long they take."""

    def __init__(self, quantization: Any, dtype: Any) -> None:
        self.engine = load_engine(
            ServerConfig(
                quantization=quantization, dtype=dtype, threads=2, kv_cache_bytes=2**28, prefix_caching=False
            )
        )
        self.seconds: dict[str, float] = defaultdict(float)
        kernels = load_kernels()
        self._time(kernels, "decoder_layers", "decoder layers, ms")
        self._time(kernels, "linear", "head, ms")
        self._time(self.engine.scheduler, "schedule", "scheduling, ms")
        self._time(self.engine.runner, "run", "run")
        self._time(self.engine, "_postprocess", "sampling and text, ms")

    def _time(self, owner: object, name: str, part: str) -> None:
        call = getattr(owner, name)

        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.seconds[part] += time.perf_counter() - started

        setattr(owner, name, timed)

    def steps(self, rows: int, prompt: int, plan: str) -> dict[str, float]:
        """Medians in milliseconds of a plan's steps, by part."""
        prefill = plan.startswith("prefill")
        found: list[dict[str, float]] = []
        for attempt in range(STEPS // 4 if prefill else 1):
            for n in range(rows):
                ids = tuple(1000 + 7919 * (attempt + n) % 30_000 + i for i in range(prompt))
                stopping = StoppingParams(max_new_tokens=1 if prefill else STEPS + 2, ignore_eos=True)
                self.engine.submit(Request(f"{plan} {attempt} {n}", ids, stopping=stopping))
            while self.engine.has_work:
                self.seconds.clear()
                started = time.perf_counter()
                stats = self.engine.step().stats
                total = time.perf_counter() - started
                if stats and (stats.prefill_rows == prompt if prefill else stats.decode_rows == rows):
                    found.append({"step, ms": total, **self.seconds})
        medians = {key: 1000 * statistics.median(one[key] for one in found) for key in found[0]}
        for part in ("decoder layers, ms", "head, ms"):
            medians.setdefault(part, 0.0)  # computed by torch: among the rest
        run = medians.pop("run")
        medians["rest of the model, ms"] = run - medians["decoder layers, ms"] - medians["head, ms"]
        return medians


def run(rounds: int) -> list[Row]:
    read = bandwidth()
    head_rate = products_per_second("none")
    rows: list[Row] = []
    for name, (quantization, dtype) in CONFIGS.items():
        timed = Timed(quantization, dtype)
        model = timed.engine.base.model
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        spec = timed.engine.base.spec
        body = sum(s.in_features * s.out_features for s in spec.linears.values() if not s.is_head)
        head_size = spec.hidden_size * spec.vocabulary_size
        # The embedding's table isn't read but for a row of it.
        bytes_read = weight_bytes(model) - head_size * 2
        body_rate = products_per_second(quantization)
        for count, prompt, plan in PLANS:
            parts = timed.steps(count, prompt, plan)
            computed = prompt if plan.startswith("prefill") else count
            limit = 1000 * max(
                bytes_read / read, 2 * computed * body / body_rate + 2 * count * head_size / head_rate
            )
            bound = "memory" if limit == 1000 * bytes_read / read else "products"
            rows.append(
                {
                    "weights": name,
                    "step": plan,
                    "bound by": bound,
                    "limit, ms": limit,
                    "step, ms": parts.pop("step, ms"),
                    "share of the limit, %": 0.0,
                    **dict(sorted(parts.items())),
                }
            )
            rows[-1]["share of the limit, %"] = 100 * limit / rows[-1]["step, ms"]
    print(f"  {read / 1e9:.1f} GB/s read; {head_rate / 1e9:.0f} GFLOP/s in bfloat16", flush=True)
    return rows


EXPERIMENT = Experiment("limits", run)
