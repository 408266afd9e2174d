"""Bottleneck adapters (arXiv 1902.00751, 2005.00247, 2110.04366, 2106.04647), compiled to Bottleneck.

Where a layer adds a part's output h to the residual stream r, the library computes
(adapters/methods/modeling.py, Adapter and ParallelAdapter, with no layer norm handed in):

    sequential: x = r + h with original_ln_before, else h; skip = h with residual_before_ln, else x
                stream = N(A(x)) + skip, or N(A(x) + skip) with adapter_residual_before_ln
    parallel:   x = r; stream = N(A(x)) + h

and adds r once more with original_ln_after. `A(x) = scaling (U act(D M(x) + d) + u)`; M and N are layer norms
of the adapter's own, with ln_before and ln_after. Models that the library serves by hooks (Qwen2 and Qwen3,
adapters/methods/bottleneck.py) come to the same, r being added by the model itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from polygraft.adapters.adapterhub.coupling import take_coupling
from polygraft.adapters.adapterhub.layers import Layer
from polygraft.adapters.adapterhub.non_linearity import PRELU, take_non_linearity, take_slope, without_prelu
from polygraft.adapters.adapterhub.options import Options
from polygraft.adapters.adapterhub.phm import PHM, take_phm
from polygraft.adapters.adapterhub.source import Parts, Source
from polygraft.adapters.files.numbers import is_alpha
from polygraft.base.inspect.residual_sites import ATTENTION, FEED_FORWARD
from polygraft.core.primitives import Bottleneck, NormAfter
from polygraft.errors import AdapterInvalid

_PLACES = {
    "mh_adapter": (ATTENTION, "attention_adapters"),
    "output_adapter": (FEED_FORWARD, "output_adapters"),
}
# `cross_adapter` is for the cross-attention of encoder-decoder models.
_NO_EFFECT = ("init_weights", "init_weights_seed", "dropout", "stochastic_depth", "cross_adapter")
_MAX_WIDTH = 2**31


def compile_bottlenecks(source: Source, options: Options) -> Generator[None, None, Parts]:
    """Compile a method of bottleneck adapters; yields between them. Problems are noted in the reader.

    Raises:
        AdapterInvalid: the base has no place for them.
    """
    settings = _Settings.take(source, options)
    parts = Parts("bottleneck", coupling=take_coupling(source, options, settings.activation))
    left_out = options.layers_left_out()
    wanted = [place for key, place in _PLACES.items() if options.flag(key)]
    for layer in source.layers.layers:
        if layer.index in left_out:
            continue
        for place, module in wanted:
            yield
            if place not in layer.places:
                raise AdapterInvalid(
                    source.reader.name, [*source.reader.problems, _why_not(source, layer, place)]
                )
            width = settings.width(layer.index, source.base.hidden_size, options)
            if width is None or settings.activation is None:
                return parts
            one = _Adapter(source, settings, f"{layer.name}.{module}.adapters.{source.name}", width)
            primitive = one.compile()
            if primitive is not None:
                parts.bottlenecks[layer.site(place)] = primitive
    return parts


def _why_not(source: Source, layer: Layer, place: str) -> str:
    """Why a place of a layer has no bottlenecks."""
    if layer.site(place) in source.base.residual:
        why = (
            "its layers normalize a part's output before they add it, and the adapters would act before that"
        )
    else:
        why = "its layers don't add one part's output to the residual stream and then another's"
    return f"bottleneck adapters aren't served on this base: {why}"


@dataclass(frozen=True, slots=True)
class _Settings:
    """The options that all bottlenecks of a method share.

    Args:
        reads, residual: as in `Bottleneck`.
        skip: what is added to the bottleneck's result, or with a norm afterwards inside or outside of it.
        skips_inside: whether it is added before `ln_after`.
        scaling: a number, "learned" or "channel"; None after noting a problem.
    """

    reads: Literal["sum", "output", "residual"]
    skip: Literal["output", "sum"]
    skips_inside: bool
    keeps_residual: bool
    norm_before: bool
    norm_after: bool
    activation: str | None
    scaling: float | str | None
    factor: object
    phm: PHM | None

    @classmethod
    def take(cls, source: Source, options: Options) -> _Settings:
        """Take them from a block."""
        options.ignore(*_NO_EFFECT)
        parallel = options.flag("is_parallel")
        sums_before = options.flag("original_ln_before")
        skips_output = options.take("residual_before_ln", (bool, str), True)
        skips_inside = options.flag("adapter_residual_before_ln")
        if isinstance(skips_output, str):
            if not parallel:
                options.refuse("residual_before_ln", skips_output, "has no meaning in a pre-norm model")
            skips_output = True
        return cls(
            reads="residual" if parallel else "sum" if sums_before else "output",
            skip="sum" if sums_before and not skips_output and not parallel else "output",
            skips_inside=skips_inside and not parallel,
            keeps_residual=options.flag("original_ln_after", True),
            norm_before=options.flag("ln_before"),
            norm_after=options.flag("ln_after"),
            activation=take_non_linearity(source, options),
            scaling=_take_scaling(options),
            factor=options.take("reduction_factor", (int, float, dict), None),
            phm=take_phm(source, options),
        )

    @property
    def residual(self) -> float:
        """How often r is in the stream afterwards, but for a skip that a norm comes with."""
        return self.keeps_residual + (self.skip == "sum" and not self.norm_after)

    def width(self, layer: int, hidden: int, options: Options) -> int | None:
        """Of a layer's bottleneck; None after noting a problem."""
        factor = self.factor
        if isinstance(factor, Mapping):
            factor = factor.get(str(layer), factor.get("default"))
        if is_alpha(factor) and factor > 0 and hidden / factor < _MAX_WIDTH:
            return max(1, int(hidden // factor))
        options.refuse("reduction_factor", self.factor, f"makes no sense for layer {layer}")
        return None


def _take_scaling(options: Options) -> float | str | None:
    scaling: float | str = options.take("scaling", (int, float, str), 1.0)
    if scaling in ("learned", "channel") or is_alpha(scaling):
        return scaling
    options.refuse("scaling", scaling, "must be a number, 'learned' or 'channel'")
    return None


@dataclass(frozen=True, slots=True)
class _Adapter:
    """One bottleneck of the file, by its module's name."""

    source: Source
    settings: _Settings
    module: str
    width: int

    def compile(self) -> Bottleneck | None:
        """Its primitive; None after noting a problem."""
        settings, hidden = self.settings, self.source.base.hidden_size
        at, by_channel = int(settings.norm_before), settings.scaling == "channel"
        norm = self._norm("adapter_norm_before", "adapter_down.0") if settings.norm_before else None
        # A matrix with a vector or a PReLU's slope folded in is computed in float32 and rounded at most once.
        computes_up = by_channel or settings.activation == PRELU
        down = self._linear(f"adapter_down.{at}", "down", hidden, self.width, wide=settings.norm_before)
        up = self._linear("adapter_up", "up", self.width, hidden, wide=computes_up)
        slope = None
        if settings.activation == PRELU:
            slope = take_slope(
                self.source, f"{self.module}.non_linearity", f"{self.module}.adapter_down.{at + 1}"
            )
        scaling = self._scaling()
        after = self._norm("adapter_norm_after") if settings.norm_after else None
        is_whole = (
            (norm is not None or not settings.norm_before)
            and (slope is not None or settings.activation != PRELU)
            and (after is not None or not settings.norm_after)
        )
        if down is None or up is None or scaling is None or not is_whole:
            return None
        if norm is not None:
            down = _fold_norm(*down, *norm)
        if not self._is_finite(*up, scaling):
            return None
        assert settings.activation is not None
        primitive = Bottleneck(
            down[0],
            up[0] * scaling[:, None] if by_channel else up[0],
            settings.activation,
            settings.reads,
            down[1],
            None if up[1] is None else up[1] * scaling,
            normalizes=norm is not None,
            residual=settings.residual,
            norm_after=after and NormAfter(*after, settings.skip, settings.skips_inside),
            scaling=1.0 if by_channel else float(scaling),
        )
        if slope is not None:
            primitive = _without_prelu(primitive, slope)
        reader = self.source.reader
        kept_down = reader.keep(primitive.down, self.module) if settings.norm_before else primitive.down
        kept_up = reader.keep(primitive.up, self.module) if computes_up else primitive.up
        if kept_down is None or kept_up is None:
            return None
        # A bottleneck's two matrices must share a type, even if the file's don't.
        dtype = torch.promote_types(kept_down.dtype, kept_up.dtype)
        return dataclasses.replace(
            primitive, down=kept_down.to(dtype).contiguous(), up=kept_up.to(dtype).contiguous()
        )

    def _linear(
        self, module: str, position: str, inputs: int, outputs: int, *, wide: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Weight [outputs, inputs] and bias [outputs] of a projection.

        Args:
            wide: return the weight in float32, since another is computed from it.
        """
        if self.settings.phm is not None:
            return self.settings.phm.linear(f"{self.module}.{module}", position, inputs, outputs, wide=wide)
        reader = self.source.reader
        weight = reader.take(f"{self.module}.{module}.weight", (outputs, inputs), wide=wide)
        bias = reader.take(f"{self.module}.{module}.bias", (outputs,), wide=True)
        return None if weight is None or bias is None else (weight, bias)

    def _norm(self, *modules: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Weight and bias [hidden] of a layer norm that is saved with any of these modules."""
        taken = [
            self.source.take_any(
                [f"{self.module}.{module}.{part}" for module in modules],
                (self.source.base.hidden_size,),
                wide=True,
            )
            for part in ("weight", "bias")
        ]
        weight, bias = taken
        return None if weight is None or bias is None else (weight, bias)

    def _scaling(self) -> torch.Tensor | None:
        """A number [] or factors by channel [hidden]."""
        scaling = self.settings.scaling
        name = f"{self.module}.scaling"
        if scaling == "learned":
            learned = self.source.reader.take(name, (1,), wide=True)
            return None if learned is None else learned[0]
        if scaling == "channel":
            return self.source.reader.take(name, (self.source.base.hidden_size,), wide=True)
        return None if scaling is None else torch.tensor(scaling, dtype=torch.float32)

    def _is_finite(self, up: torch.Tensor, up_bias: torch.Tensor | None, scaling: torch.Tensor) -> bool:
        """Whether a projection's weight and bias stay finite when scaled; notes it if not."""
        largest = scaling.abs().max() * max(1.0, float(up.abs().max()))
        if largest.isfinite() and (up_bias is None or (up_bias * scaling).isfinite().all()):
            return True
        self.source.reader.problems.append(f"the scaling makes weights of {self.module} infinite")
        return False


def _fold_norm(
    down: torch.Tensor, down_bias: torch.Tensor | None, norm_weight: torch.Tensor, norm_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`D (g x + b) + d` is `(D g) x + (D b + d)`; all float32."""
    bias = down @ norm_bias
    return down * norm_weight, bias if down_bias is None else bias + down_bias


def _without_prelu(primitive: Bottleneck, slope: float) -> Bottleneck:
    down, down_bias, up = without_prelu(primitive.down, primitive.down_bias, primitive.up, slope)
    return dataclasses.replace(primitive, down=down, down_bias=down_bias, up=up, activation="relu")
