"""The weights of all resident adapters that layers run, whatever primitives they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.primitives import LowRank
from polygraft.layers.experts.routers import Routers
from polygraft.layers.experts.sites import ExpertSites
from polygraft.layers.linear.low_rank_bank import LowRankBank, Run
from polygraft.layers.linear.merging import AnySite
from polygraft.layers.operators import operators_for
from polygraft.layers.replaced.modules import ReplacedModules
from polygraft.layers.residual.bottlenecks import BottleneckSites
from polygraft.layers.residual.couplings import Couplings
from polygraft.layers.step import Segments, StepContext

if TYPE_CHECKING:
    from polygraft.core.spec import BaseSpec


class AdapterBank:
    """A slot for each resident adapter, over all modules and sites of one base.

    Args:
        native: False runs the operators in torch, for tests and for comparing.
    """

    def __init__(self, model: PreTrainedModel, base: BaseSpec, step: StepContext, native: bool) -> None:
        modules = {name: shape.is_head for name, shape in base.linears.items()}
        operators = operators_for(model.device, native=native)
        kernels = operators.kernels
        self.modules = LowRankBank(model, modules, step, operators)
        self.bottlenecks = BottleneckSites(
            model, base.residual, step, kernels, model.device, first_bit=len(modules)
        )
        bit = len(modules) + len(base.residual)
        self._couplings = self._make_couplings(model, base, step, bit)
        self.experts = ExpertSites(model, base.experts, step, operators, first_bit=bit + 1)
        bit += 1 + len(base.experts)
        self.routers = Routers(model, base.routers, step, first_bit=bit)
        self.replaced = ReplacedModules(model, base, step, kernels, first_bit=bit + len(base.routers))
        # By slot: bits of the sites, and the largest width of a bottleneck.
        self._beside: dict[int, tuple[int, int]] = {}
        self._hidden = base.hidden_size

    @staticmethod
    def _make_couplings(
        model: PreTrainedModel, base: BaseSpec, step: StepContext, bit: int
    ) -> Couplings | None:
        head = model.get_output_embeddings()
        layer = next((site.layer for site in base.residual.values()), None)
        if layer is None or head is None:
            return None
        return Couplings(model.get_submodule(layer), head, step, bit)

    def install(self, compiled: AdapterWeights) -> int:
        """Take an adapter in, resolved against the base; returns its slot. Slots count from 1, since 0 stands
        for the base."""
        slot = self.modules.install(compiled.modules)
        bits = self.bottlenecks.install(slot, compiled.bottlenecks) | self.replaced.install(slot, compiled)
        bits |= self.experts.install(slot, compiled.experts) | self.routers.install(slot, compiled.modules)
        if compiled.coupling is not None:
            assert self._couplings is not None, "compiled for another base"
            bits |= self._couplings.install(slot, compiled.coupling)
        self._beside[slot] = bits, compiled.width
        return slot

    def low_rank(self, slot: int, compiled: AdapterWeights, name: str) -> LowRank:
        """A and B that the adapter in a slot has for a module or, if it has none there, the embedding."""
        change = compiled.modules.get(name)
        if change is not None and change.low_rank is not None:
            return self.modules.site(name).slots.low_rank(slot, len(change.low_rank.b))
        assert self.replaced.table is not None
        return self.replaced.table.low_rank(slot)

    def remove(self, slot: int) -> None:
        """Let an adapter go; no step that uses it may be running."""
        del self._beside[slot]
        self.bottlenecks.remove(slot)
        self.replaced.remove(slot)
        self.experts.remove(slot)
        self.routers.remove(slot)
        if self._couplings is not None:
            self._couplings.remove(slot)
        self.modules.remove(slot)

    def segments(self, *depths: Sequence[Run]) -> Segments:
        """Describe the adapters of a step's rows, as `LowRankBank.segments` does."""
        segments = self.modules.segments(*depths)
        bits = width = 0
        for segment in segments.host:
            own, widest = self._beside[segment.slot]
            bits |= own
            width = max(width, widest)
        if not bits:
            return segments
        floats = 2 * self._hidden + width if width else 0
        return replace(segments, touched=segments.touched | bits, max_width=width, site_floats=floats)

    def merge_sites(self, slot: int) -> list[AnySite]:
        """Where an adapter's weights can be folded into the base's."""
        parts = (self.modules, self.experts, self.routers)
        return [site for part in parts for site in part.merge_sites(slot)]

    @property
    def resident(self) -> int:
        """Adapters that hold a slot."""
        return len(self._beside)
