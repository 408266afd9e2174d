"""The modules of a base that hold several experts, with adapters' low-rank weights on them.

A step in which no row has such an adapter runs transformers' own product, at the cost of one test of a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from polygraft.core.primitives import ExpertLowRank
from polygraft.layers.experts.forward import experts_forward
from polygraft.layers.experts.low_rank import ExpertSlots
from polygraft.layers.experts.merging import ExpertsMergeSite
from polygraft.layers.experts.pairs import ExpertRuns, pair_up
from polygraft.layers.operators import Operators
from polygraft.layers.step import Segments, StepContext

if TYPE_CHECKING:
    from polygraft.core.spec import ExpertsShape


class ExpertSites:
    """All of one base, in the places of its modules' forwards.

    Args:
        shapes: as `BaseSpec` has them.
        first_bit: of the modules' in `Segments.touched`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        shapes: Mapping[str, ExpertsShape],
        step: StepContext,
        operators: Operators,
        first_bit: int,
    ) -> None:
        self._step = step
        self._device = model.device
        self._bits: dict[str, int] = {}
        self._slots: dict[str, ExpertSlots] = {}
        self._merge_sites: dict[str, ExpertsMergeSite] = {}
        # By slot of the bank: the adapter's number among those with weights here, and its largest rank.
        self._adapters: dict[int, tuple[int, int]] = {}
        self._numbers: dict[int, int] = {}
        self._free: list[int] = []
        self._runs: tuple[Segments, ExpertRuns] | None = None
        for bit, (name, shape) in enumerate(shapes.items(), first_bit):
            module = model.get_submodule(name)
            slots = {
                weight: ExpertSlots(shape.experts, *widths, operators, self._device)
                for weight, widths in shape.weights.items()
            }
            for weight, one in slots.items():
                parameter = f"{name}.{weight}"
                self._bits[parameter] = 1 << bit
                self._slots[parameter] = one
                self._merge_sites[parameter] = ExpertsMergeSite(
                    module, weight, one, self._numbers, transposed=shape.transposed
                )
            module.forward = self._with_side_paths(module, module.forward, shape.experts, slots, bit)

    def _with_side_paths(
        self,
        module: Any,
        forward: Callable[..., Any],
        experts: int,
        slots: Mapping[str, ExpertSlots],
        bit: int,
    ) -> Callable[..., Any]:
        """A module's forward with the side paths of the step's adapters."""

        def run(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Any:
            if not self._step.segments.touched >> bit & 1:
                return forward(x, index, weights)
            pairs = pair_up(index, experts, self._runs_of(self._step.segments, len(x)))
            return experts_forward(module, x, weights, pairs, slots)

        return run

    def _runs_of(self, segments: Segments, rows: int) -> ExpertRuns:
        """Those of the running step, made for its first layer and kept for the others."""
        if self._runs is None or self._runs[0] is not segments:
            self._runs = segments, ExpertRuns.of(segments, self._adapters, rows, self._device)
        return self._runs[1]

    def install(self, slot: int, experts: Mapping[str, ExpertLowRank]) -> int:
        """Take an adapter in; returns the bits of its modules.

        Args:
            experts: by the name of the parameter.
        """
        if not experts:
            return 0
        number = self._free.pop() if self._free else len(self._adapters)
        for slots in self._slots.values():
            slots.reserve(number + 1)
        self._numbers[slot] = number
        self._adapters[slot] = number, max(primitive.rank for primitive in experts.values())
        touched = 0
        for name, primitive in experts.items():
            self._slots[name].install(number, primitive)
            touched |= self._bits[name]
        return touched

    def remove(self, slot: int) -> None:
        """Let an adapter go; no step that uses it may be running."""
        if slot not in self._adapters:
            return
        number, _ = self._adapters.pop(slot)
        del self._numbers[slot]
        for slots in self._slots.values():
            slots.remove(number)
        self._free.append(number)
        self._runs = None

    def merge_sites(self, slot: int) -> list[ExpertsMergeSite]:
        """Where an adapter's weights can be folded into the base's."""
        number = self._numbers.get(slot, -1)
        return [site for name, site in self._merge_sites.items() if self._slots[name].holds(number)]
