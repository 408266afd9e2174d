"""Routers with adapters in their weights, and which modules are taken for routers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from polygraft.base.inspect.routers import find_routers
from polygraft.base.inspect.trace import record
from polygraft.core.adapter_weights import ModuleChange
from polygraft.core.primitives import LowRank
from polygraft.core.spec import RouterShape
from polygraft.layers.experts.routers import Routers
from polygraft.layers.linear.merging import WeightSwitch, merge
from polygraft.layers.step import NO_SEGMENTS, Segment, Segments, StepContext
from tests.layers.served import NOWHERE, random

HIDDEN, EXPERTS, TOP = 12, 6, 2
Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Router(nn.Module):
    """As Mixtral's: logits, scores and indices of the chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(EXPERTS, HIDDEN, seed=1), requires_grad=False)
        self.top_k = TOP

    def forward(self, x: torch.Tensor) -> Outputs:
        logits = nn.functional.linear(x.reshape(-1, x.shape[-1]), self.weight)
        top = logits.softmax(-1).topk(self.top_k)
        return logits, top.values, top.indices


class Served:
    def __init__(self) -> None:
        self.bare = Router()
        self.model = nn.Module()
        self.model.gate = Router()
        self.step = StepContext()
        self.routers = Routers(self.model, {"gate": RouterShape(HIDDEN, EXPERTS)}, self.step, first_bit=2)
        self.adapters: dict[int, LowRank] = {}

    def install(self, slot: int, rank: int) -> None:
        self.adapters[slot] = LowRank(
            random(rank, HIDDEN, seed=slot), random(EXPERTS, rank, seed=slot + 50), scaling=0.3 + slot
        )
        assert self.routers.install(slot, {"gate": ModuleChange(self.adapters[slot])}) == 1 << 2

    def run(self, x: torch.Tensor, *depths: Sequence[Segment]) -> Outputs:
        host = [segment for depth in depths for segment in depth]
        segments = Segments(torch.zeros(0), host, 1 << 2 if host else 0, 0)
        self.step.begin(NOWHERE, segments, NO_SEGMENTS, len(x))
        with torch.inference_mode():
            out: Outputs = self.model.gate(x)
        self.step.end()
        return out

    def expected(self, x: torch.Tensor, *stack: tuple[int, float]) -> Outputs:
        """Of rows with these adapters."""
        weight = self.bare.weight
        for slot, factor in stack:
            weight = weight + factor * self.adapters[slot].product
        out: Outputs = torch.func.functional_call(self.bare, {"weight": weight}, (x,))
        return out


def check(out: Outputs, expected: Outputs, rows: slice) -> None:
    for mine, theirs in zip(out, expected, strict=True):
        torch.testing.assert_close(mine[rows], theirs)


@pytest.mark.parametrize("batched", [False, True])
def test_rows_of_adapters_choose_for_themselves(batched: bool) -> None:
    served = Served()
    served.install(4, 3)
    served.install(9, 5)
    x = random(11, HIDDEN, seed=3)
    first = [Segment(1, 5, 4), Segment(5, 6, 77), Segment(7, 11, 9, -0.5)]
    out = served.run(x[None] if batched else x, first, [Segment(3, 5, 9, 2.0)])
    check(out, served.expected(x[:1]), slice(0, 1))
    check(out, served.expected(x[1:3], (4, 1.0)), slice(1, 3))
    check(out, served.expected(x[3:5], (4, 1.0), (9, 2.0)), slice(3, 5))
    check(out, served.expected(x[5:7]), slice(5, 7))
    check(out, served.expected(x[7:], (9, -0.5)), slice(7, 11))
    assert not torch.equal(out[2], served.expected(x)[2])
    assert served.model.gate.top_k == TOP
    served.routers.remove(4)
    check(served.run(x, [Segment(0, 5, 4), Segment(5, 11, 9)]), served.expected(x[:5]), slice(0, 5))


def test_a_merged_copy() -> None:
    served = Served()
    served.install(4, 3)
    assert served.routers.merge_sites(5) == []
    making = merge(served.routers.merge_sites(4), 4, requantize=False)
    while True:
        try:
            next(making)
        except StopIteration as end:
            copy = end.value
            break
    assert copy.nbytes == 4 * EXPERTS * HIDDEN
    x, own, switch = random(7, HIDDEN, seed=3), served.model.gate.base_layer.weight, WeightSwitch()
    switch.use(copy)
    check(served.run(x), served.expected(x, (4, 1.0)), slice(0, 7))
    switch.use(None)
    assert served.model.gate.base_layer.weight is own
    assert torch.equal(own, served.bare.weight)


class Mixing(Router):
    def forward(self, x: torch.Tensor) -> Outputs:
        return super().forward(x - x.mean(0))


class Pooling(Router):
    def forward(self, x: torch.Tensor) -> Outputs:
        logits, scores, indices = super().forward(x)
        return logits, scores, indices.float().mean(0)


class Listing(Router):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return list(super().forward(x))


class Fixed(Router):
    """Takes as many rows as in its first call alone."""

    rows = 0

    def forward(self, x: torch.Tensor) -> Outputs:
        self.rows = self.rows or len(x)
        return super().forward(x.view(self.rows, -1))


class Three(Router):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(EXPERTS, HIDDEN, 1, seed=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


X = random(8, HIDDEN, seed=3)
CALLS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[torch.Tensor, ...], ...], bool]] = {
    "rows": (Router, ((X,),), True),
    "rows of one sequence": (Router, ((X[None],),), True),
    "never called": (Router, (), False),
    "twice": (Router, ((X,), (X,)), False),
    "other rows": (Router, ((X[:4],),), False),
    "mixes rows": (Mixing, ((X,),), False),
    "gives less": (Pooling, ((X,),), False),
    "gives a list": (Listing, ((X,),), False),
    "takes no fewer": (Fixed, ((X,),), False),
    "another weight": (Three, ((X,),), False),
    "a linear module": (lambda: nn.Linear(HIDDEN, EXPERTS), ((X,),), False),
}


@pytest.mark.parametrize(("make", "calls", "found"), CALLS.values(), ids=CALLS)
def test_what_is_taken_for_a_router(
    make: Callable[[], nn.Module], calls: Sequence[tuple[torch.Tensor, ...]], found: bool
) -> None:
    model = nn.Module()
    model.gate = make()
    with torch.inference_mode(), record(model) as trace:
        for args in calls:
            model.gate(*args)
    assert dict(find_routers(trace, len(X))) == ({"gate": RouterShape(HIDDEN, EXPERTS)} if found else {})
