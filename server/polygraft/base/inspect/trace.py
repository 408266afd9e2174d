"""Records one forward of a model: each call of a module, and each sum of two tensors.

The functions of this package that find linears, norms, experts, routers and residual sites read such a trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_ADDITIONS = {torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__, torch.add}


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a module. It holds the arguments and outputs, so that their ids stay unique."""

    module: nn.Module
    args: tuple[Any, ...]  # of any type: each architecture calls its modules in its own way
    kwargs: dict[str, Any]
    out: Any

    @property
    def input(self) -> torch.Tensor | None:
        """The first positional argument, if it is a tensor."""
        x = self.args[0] if self.args else None
        return x if isinstance(x, torch.Tensor) else None

    @property
    def hidden_states(self) -> torch.Tensor | None:
        """The input of a layer or of one of its parts, given by position or by name."""
        x = self.args[0] if self.args else self.kwargs.get("hidden_states")
        return x if isinstance(x, torch.Tensor) else None

    @property
    def output(self) -> torch.Tensor | None:
        """The output, or the first of several, if it is a tensor."""
        y = self.out[0] if isinstance(self.out, tuple) else self.out
        return y if isinstance(y, torch.Tensor) else None


class Trace:
    """All calls of one forward, in the order in which they returned: inner calls come before outer ones."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: list[Call] = []
        self._by_module: dict[nn.Module, list[Call]] = {}
        # Ids stay unique because the terms are held along with their sum.
        self._sums: dict[frozenset[int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def calls_of(self, module: nn.Module) -> Sequence[Call]:
        """The calls of one module."""
        return self._by_module.get(module, ())

    def sum_of(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
        """The last result of `x + y` or `y + x`; None if these two objects were never added."""
        found = self._sums.get(frozenset((id(x), id(y))))
        return None if found is None else found[2]

    def add_call(self, call: Call) -> None:
        """Record a call that has returned."""
        self.calls.append(call)
        self._by_module.setdefault(call.module, []).append(call)

    def add_sum(self, x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
        """Record that `x + y` gave `out`."""
        self._sums[frozenset((id(x), id(y)))] = x, y, out


@contextmanager
def record(model: nn.Module) -> Iterator[Trace]:
    """Record what a model runs in this context; its hooks are removed at the end."""
    trace = Trace(model)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        trace.add_call(Call(module, args, kwargs, out))

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in model.modules()]
    try:
        with _RecordSums(trace):
            yield trace
    finally:
        for hook in hooks:
            hook.remove()


class _RecordSums(TorchFunctionMode):
    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ADDITIONS and not kwargs and all(isinstance(x, torch.Tensor) for x in args[:2]):
            self._trace.add_sum(args[0], args[1], out)
        return out
