"""A trace holds the calls of a forward and the sums of its tensors, by identity."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polygraft.base.inspect.trace import record


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return hidden_states + self.inner(hidden_states), None


def test_calls_and_sums_are_recorded_by_identity() -> None:
    layer, x = Layer(), torch.ones(2, 3)
    with record(layer) as trace:
        out, _ = layer(hidden_states=x)
    inner, outer = trace.calls
    assert (inner.module, outer.module) == (layer.inner, layer)
    assert inner.input is x
    assert outer.input is None
    assert outer.hidden_states is x
    assert outer.output is out
    assert inner.output is not None
    assert trace.sum_of(inner.output, x) is trace.sum_of(x, inner.output) is out
    assert trace.sum_of(x, x) is None
    assert list(trace.calls_of(layer)) == [outer]


def test_nothing_is_recorded_behind_the_context() -> None:
    layer = Layer()
    with pytest.raises(RuntimeError), record(layer) as trace:
        layer(torch.ones(2, 4))
    layer(torch.ones(2, 3))
    assert not trace.calls
