"""What one step costs, without a clock: operator calls and the bytes of the tensors that go through them.

A change that adds calls or bytes to a step fails here until the recorded figures are renewed, so that nobody
makes the step heavier unawares: `POLYGRAFT_RECORD_STEP_COST=1 pytest tests/engine/test_step_cost.py`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from polygraft.engine.engine import Engine
from polygraft.layers.native.kernels import load_kernels
from polygraft_types.requests import Request
from tests.engines import greedy, make_engine

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")
RECORD = Path(__file__).with_name("step_cost.json")
NATIVE = ("decoder_layers", "linear", "paged_attention", "rms_norm", "gate", "rotate", "likeliest")
LOOKUPS = (torch.ops.aten.index_select.default, torch.ops.aten.embedding.default)
"""Of their first argument they read no more than they give."""
MIX = [None, "lora", "lora", "lora-bias", "prefix", "prompt"]


class Counting(TorchDispatchMode):
    """Counts torch's operators and the bytes of what they read and write; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.cost: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.cost["torch_calls"] += 1
            read = (out, args[1:]) if function in LOOKUPS else args
            tensors = [t for t in tree_leaves((read, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.cost["torch_bytes"] += sum(tensor.nbytes for tensor in tensors)
        return out


def cost_of_a_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    kernels = load_kernels()
    counting = Counting()

    def counted(name: str, call: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            counting.cost[f"native_{name}"] += 1
            call(*args)

        return run

    with monkeypatch.context() as patch, counting:
        for name in NATIVE:
            patch.setattr(kernels, name, counted(name, getattr(kernels, name)))
        engine.step()
    return dict(sorted(counting.cost.items()))


def mix(first: int) -> list[Request]:
    return [
        greedy(f"{first} {at}", list(range(first + at, first + 20 + at)), name, 8)
        for at, name in enumerate(MIX)
    ]


def test_a_step_costs_what_is_recorded(
    llama: Path, llama_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llama, llama_store)
    # Once before: virtual tokens come into the cache, and buffers grow to their size.
    engine.generate(mix(50))
    for request in mix(10):
        engine.submit(request)
    measured = {
        "prefill": cost_of_a_step(engine, monkeypatch),
        "decode": cost_of_a_step(engine, monkeypatch),
    }
    if os.environ.get("POLYGRAFT_RECORD_STEP_COST"):
        RECORD.write_text(json.dumps(measured, indent=2) + "\n")
    assert measured == json.loads(RECORD.read_text())


def test_more_adapters_in_the_registry_cost_a_step_nothing(
    llama: Path, llama_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = []
    for engine in (make_engine(llama), make_engine(llama, llama_store)):
        engine.submit(greedy("one", list(range(20)), None, 8))
        engine.step()
        costs.append(cost_of_a_step(engine, monkeypatch))
    assert costs[0] == costs[1]
