"""Bottleneck adapters of a step's rows, at the sites where layers add to the residual stream.

`base/inspect/residual_sites.py` finds the sites, and `primitives.Bottleneck` has the formula; rows
without an adapter that has weights at a site are left alone. In a layer that is one C++ operator
(`decoder_layer.py`) the sites are part of it. In any other the part's output is changed so that the layer's
own addition makes the right sum: the layer's code stays as it is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from polygraft.core.residual_primitives import LAYER_NORM_EPSILON, Bottleneck
from polygraft.core.tensor_tree import shapes_of
from polygraft.layers.native.kernels import DTYPES, Kernels
from polygraft.layers.native.structures import BottleneckStruct, SiteStruct
from polygraft.layers.residual.activations import ACTIVATIONS
from polygraft.layers.step import Segments, StepContext

if TYPE_CHECKING:
    from polygraft.core.spec import ResidualSite

_READS = {"sum": 0, "output": 1, "residual": 2}
_ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


@dataclass(frozen=True, slots=True)
class _Weights:
    """One adapter's at one site; `up` [panels, width, columns], biases and norms in float32.

    Args:
        primitive: without its weights, of which these are copies.
        entry: bottleneck.h's `Bottleneck`, which points into the others.
    """

    primitive: Bottleneck
    entry: BottleneckStruct
    down: torch.Tensor
    up: torch.Tensor
    down_bias: torch.Tensor | None
    up_bias: torch.Tensor | None
    norm: tuple[torch.Tensor, torch.Tensor] | None


class BottleneckSite:
    """One site's weights by slot.

    Args:
        index: the site's bit in `Segments.touched`.
        panel: columns in a panel of `up`; 0 keeps it in one.
        device: where the weights are kept.
    """

    def __init__(self, index: int, panel: int, device: torch.device) -> None:
        self.index = index
        self._panel = panel
        self._device = device
        self._table = torch.zeros(0, dtype=torch.int64)
        self._weights: dict[int, _Weights] = {}
        self._struct = SiteStruct()
        self.address = ctypes.addressof(self._struct)
        """Of bottleneck.h's `Site`."""

    def install(self, slot: int, primitive: Bottleneck) -> None:
        """Put an adapter's weights into a slot."""
        hidden, width = primitive.up.shape
        panel = self._panel or hidden
        up = nn.functional.pad(primitive.up.to(self._device), (0, 0, 0, -hidden % panel))
        up = up.view(-1, panel, width).transpose(1, 2).contiguous()
        down = primitive.down.to(self._device, up.dtype).contiguous()
        down_bias, up_bias = self._float(primitive.down_bias), self._float(primitive.up_bias, -hidden % panel)
        after = primitive.norm_after
        norm = None if after is None else (self._own(after.weight), self._own(after.bias))
        entry = BottleneckStruct(
            down=down.data_ptr(),
            up=up.data_ptr(),
            down_bias=0 if down_bias is None else down_bias.data_ptr(),
            up_bias=0 if up_bias is None else up_bias.data_ptr(),
            width=width,
            dtype=DTYPES.get(up.dtype, -1),
            activation=_ACTIVATION_CODES[primitive.activation],
            reads=_READS[primitive.reads],
            normalizes=primitive.normalizes,
            residual=int(primitive.residual),
            norm_weight=0 if norm is None else norm[0].data_ptr(),
            norm_bias=0 if norm is None else norm[1].data_ptr(),
            norm_skips_sum=after is not None and after.skip == "sum",
            norm_inside=after is not None and after.inside,
            scaling=primitive.scaling,
        )
        self._weights[slot] = _Weights(shapes_of(primitive), entry, down, up, down_bias, up_bias, norm)
        if slot >= len(self._table):
            grown = torch.zeros(max(16, 2 * slot), dtype=torch.int64)
            grown[: len(self._table)] = self._table
            self._table = grown
            self._struct.table, self._struct.slots = grown.data_ptr(), len(grown)
        self._table[slot] = ctypes.addressof(entry)

    def _float(self, x: torch.Tensor | None, padding: int = 0) -> torch.Tensor | None:
        return None if x is None else nn.functional.pad(self._own(x), (0, padding))

    def _own(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self._device).float().contiguous()

    def remove(self, slot: int) -> None:
        """Empty a slot; no step that uses it may be running."""
        if self._weights.pop(slot, None) is not None:
            self._table[slot] = 0

    def run_torch(
        self, r: torch.Tensor, h: torch.Tensor, segments: Segments, *, minus: int = 0
    ) -> torch.Tensor:
        """The operator in torch: r, h [rows, hidden] to the stream behind the site, less r `minus` times, in
        the rows of adapters that have weights here; h elsewhere."""
        out = h.clone()
        for first, last, slot, _, _ in segments.host:
            weights = self._weights.get(slot)
            if weights is not None:
                rows = _one_adapter(weights, r[first:last].float(), h[first:last].float(), minus)
                out[first:last] = rows.to(out.dtype)
        return out


def _one_adapter(weights: _Weights, r: torch.Tensor, h: torch.Tensor, minus: int) -> torch.Tensor:
    primitive, hidden = weights.primitive, r.shape[-1]
    x = {"sum": r + h, "output": h, "residual": r}[primitive.reads]
    if primitive.normalizes:
        x = nn.functional.layer_norm(x, (hidden,), eps=LAYER_NORM_EPSILON)
    x = nn.functional.linear(x, weights.down.float(), weights.down_bias)
    up = weights.up.float().transpose(0, 1).flatten(1)[:, :hidden]
    out = (primitive.scaling * ACTIVATIONS[primitive.activation](x)) @ up
    if weights.up_bias is not None:
        out = out + weights.up_bias[:hidden]
    stream = (primitive.residual - minus) * r
    if primitive.norm_after is None or weights.norm is None:
        return stream + h + out
    skip = r + h if primitive.norm_after.skip == "sum" else h
    if primitive.norm_after.inside:
        out = out + skip
    out = nn.functional.layer_norm(out, (hidden,), *weights.norm, eps=LAYER_NORM_EPSILON)
    return stream + (out if primitive.norm_after.inside else out + skip)


class _AdaptedLayer:
    """Follows the residual stream through one layer's modules, and changes what its parts give."""

    def __init__(
        self, sites: tuple[BottleneckSite, BottleneckSite], step: StepContext, kernels: Kernels | None
    ):
        self._sites = sites
        self._bits = sum(1 << site.index for site in sites)
        self._step = step
        self._kernels = kernels
        self._stream: torch.Tensor | None = None

    def layer(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The layer's forward, noting its input."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._step.segments.touched & self._bits:
                self._stream = args[0] if args else kwargs["hidden_states"]
            out = forward(*args, **kwargs)
            self._stream = None
            return out

        return run

    def part(self, forward: Callable[..., Any], *, first: bool) -> Callable[..., Any]:
        """A part's forward, its output such that the layer's addition gives the stream behind the site."""
        site = self._sites[0 if first else 1]

        def run(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            r = self._stream
            if r is None:
                return out
            h = out[0] if isinstance(out, tuple) else out
            if self._step.segments.touched >> site.index & 1:
                h = self._run(site, r, h)
            if first:
                self._stream = r + h
            return (h, *out[1:]) if isinstance(out, tuple) else h

        return run

    def _run(self, site: BottleneckSite, r: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        hidden = h.shape[-1]
        segments, dtype = self._step.segments, DTYPES.get(h.dtype)
        if self._kernels is None or dtype is None:
            return site.run_torch(r.view(-1, hidden), h.view(-1, hidden), segments, minus=1).view(h.shape)
        r, h = r.contiguous(), h.contiguous()
        out = h.clone()
        self._kernels.bottleneck(
            dtype, site.address, segments.table.data_ptr(), len(segments.host), r.data_ptr(), h.data_ptr(),
            out.data_ptr(), h.shape[:-1].numel(), hidden, self._step.scratch.data_ptr(),
            segments.max_width, 1, torch.get_num_threads(),
        )  # fmt: skip
        return out


class BottleneckSites:
    """All sites of one base, in the places of its modules' forwards.

    Args:
        residual: as `BaseSpec` has them.
        first_bit: of the sites' in `Segments.touched`.
        panel: columns in a panel of the C++ operators, 0 without them.
    """

    def __init__(
        self,
        model: nn.Module,
        residual: Mapping[str, ResidualSite],
        step: StepContext,
        kernels: Kernels | None,
        device: torch.device,
        first_bit: int,
    ) -> None:
        panel = kernels.panel if kernels else 0
        self._sites = {
            name: BottleneckSite(first_bit + at, panel, device) for at, name in enumerate(residual)
        }
        self.by_layer: dict[str, tuple[BottleneckSite, BottleneckSite]] = {}
        """The two sites of each layer that has them."""
        layers: dict[str, dict[bool, tuple[str, str]]] = {}
        for name, where in residual.items():
            layers.setdefault(where.layer, {})[where.first] = (name, where.part)
        for layer, places in layers.items():
            pair = self._sites[places[True][0]], self._sites[places[False][0]]
            self.by_layer[layer] = pair
            adapted = _AdaptedLayer(pair, step, kernels)
            module = model.get_submodule(layer)
            module.forward = adapted.layer(module.forward)
            for first, (_, part) in places.items():
                module = model.get_submodule(part)
                module.forward = adapted.part(module.forward, first=first)

    def install(self, slot: int, bottlenecks: Mapping[str, Bottleneck]) -> int:
        """Take an adapter in; returns the bits of its sites."""
        touched = 0
        for name, primitive in bottlenecks.items():
            self._sites[name].install(slot, primitive)
            touched |= 1 << self._sites[name].index
        return touched

    def remove(self, slot: int) -> None:
        """Let an adapter go; no step that uses it may be running."""
        for site in self._sites.values():
            site.remove(slot)
