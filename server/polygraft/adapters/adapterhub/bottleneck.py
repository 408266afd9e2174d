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
from polygraft.adapters.files.problems import OptionProblem, Problem, all_of
from polygraft.base.inspect.residual_sites import ATTENTION, FEED_FORWARD
from polygraft.core.residual_primitives import Bottleneck, NormAfter

_PLACES = {
    "mh_adapter": (ATTENTION, "attention_adapters"),
    "output_adapter": (FEED_FORWARD, "output_adapters"),
}
# `cross_adapter` is for the cross-attention of encoder-decoder models.
_NO_EFFECT = ("init_weights", "init_weights_seed", "dropout", "stochastic_depth", "cross_adapter")
_MAX_WIDTH = 2**31


def compile_bottlenecks(source: Source, options: Options) -> Generator[None, None, Parts]:
    """Compile a method of bottleneck adapters; yields between them.

    Raises:
        OptionProblem: an option isn't valid, or the base has no place for them.
    """
    settings = _Settings.take(source, options)
    parts = Parts("bottleneck")
    with source.reader.noting():
        parts.coupling = take_coupling(source, options, settings.activation)
    left_out = options.layers_left_out()
    wanted = [place for key, place in _PLACES.items() if options.flag(key)]
    for layer in source.layers.layers:
        if layer.index in left_out:
            continue
        for place, module in wanted:
            yield
            if place not in layer.places:
                raise OptionProblem(_why_not(source, layer, place))
            width = settings.width(layer.index, source.base.hidden_size, options)
            name = f"{layer.name}.{module}.adapters.{source.name}"
            with source.reader.noting(f"{name}.", inner=True):
                parts.bottlenecks[layer.site(place)] = _Adapter(source, settings, name, width).compile()
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
        scaling: a number, "learned" or "channel".
    """

    reads: Literal["sum", "output", "residual"]
    skip: Literal["output", "sum"]
    skips_inside: bool
    keeps_residual: bool
    norm_before: bool
    norm_after: bool
    activation: str
    scaling: float | str
    factor: object
    phm: PHM | None

    @classmethod
    def take(cls, source: Source, options: Options) -> _Settings:
        """Take them from a block. Raises OptionProblem."""
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

    def width(self, layer: int, hidden: int, options: Options) -> int:
        """Return the width of a layer's bottleneck. Raises OptionProblem."""
        factor = self.factor
        if isinstance(factor, Mapping):
            factor = factor.get(str(layer), factor.get("default"))
        if is_alpha(factor) and factor > 0 and hidden / factor < _MAX_WIDTH:
            return max(1, int(hidden // factor))
        raise options.problem("reduction_factor", self.factor, f"isn't valid for layer {layer}")


def _take_scaling(options: Options) -> float | str:
    scaling: float | str = options.take("scaling", (int, float, str), 1.0)
    if scaling in ("learned", "channel") or is_alpha(scaling):
        return scaling
    raise options.problem("scaling", scaling, "must be a number, 'learned' or 'channel'")


@dataclass(frozen=True, slots=True)
class _Adapter:
    """One bottleneck of the file, by its module's name."""

    source: Source
    settings: _Settings
    module: str
    width: int

    def compile(self) -> Bottleneck:
        """Return its primitive. Raises Problem."""
        settings, hidden = self.settings, self.source.base.hidden_size
        at, by_channel = int(settings.norm_before), settings.scaling == "channel"
        # A matrix with a vector or a PReLU's slope folded in is computed in float32 and rounded at most once.
        computes_up = by_channel or settings.activation == PRELU
        down, (up, up_bias), *norm = all_of(
            lambda: self._linear(f"adapter_down.{at}", "down", hidden, self.width, wide=settings.norm_before),
            lambda: self._linear("adapter_up", "up", self.width, hidden, wide=computes_up),
            *([lambda: self._norm("adapter_norm_before", "adapter_down.0")] if settings.norm_before else []),
        )
        scaling = self._scaling()
        after = self._norm("adapter_norm_after") if settings.norm_after else None
        if norm:
            norm_weight, norm_bias = norm[0]
            assert norm_bias is not None
            down = _fold_norm(*down, norm_weight, norm_bias)
        self._check_finite(up, up_bias, scaling)
        primitive = Bottleneck(
            down[0],
            up * scaling[:, None] if by_channel else up,
            settings.activation,
            settings.reads,
            down[1],
            None if up_bias is None else up_bias * scaling,
            normalizes=bool(norm),
            residual=settings.residual,
            norm_after=after and NormAfter(*after, settings.skip, settings.skips_inside),
            scaling=1.0 if by_channel else float(scaling),
        )
        if settings.activation == PRELU:
            layers = f"{self.module}.non_linearity", f"{self.module}.adapter_down.{at + 1}"
            primitive = _without_prelu(primitive, take_slope(self.source, *layers))
        return self._kept(primitive, computes_up)

    def _kept(self, primitive: Bottleneck, computes_up: bool) -> Bottleneck:
        """Return it in the type that adapters are kept in; its two matrices must share one."""
        reader = self.source.reader
        computes_down = self.settings.norm_before
        down = reader.keep(primitive.down, self.module) if computes_down else primitive.down
        up = reader.keep(primitive.up, self.module) if computes_up else primitive.up
        dtype = torch.promote_types(down.dtype, up.dtype)
        return dataclasses.replace(primitive, down=down.to(dtype).contiguous(), up=up.to(dtype).contiguous())

    def _linear(
        self, module: str, position: str, inputs: int, outputs: int, *, wide: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Take weight [outputs, inputs] and bias [outputs] of a projection. Raises Problem.

        Args:
            wide: return the weight in float32, since another is computed from it.
        """
        if self.settings.phm is not None:
            return self.settings.phm.linear(f"{self.module}.{module}", position, inputs, outputs, wide=wide)
        reader = self.source.reader
        weight = reader.take(f"{self.module}.{module}.weight", (outputs, inputs), wide=wide)
        return weight, reader.take(f"{self.module}.{module}.bias", (outputs,), wide=True)

    def _norm(self, *modules: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Take weight and bias [hidden] of a layer norm that is saved with any of these modules."""
        weight, bias = (
            self.source.take_any(
                [f"{self.module}.{module}.{part}" for module in modules],
                (self.source.base.hidden_size,),
                wide=True,
            )
            for part in ("weight", "bias")
        )
        return weight, bias

    def _scaling(self) -> torch.Tensor:
        """Return a number [] or factors by channel [hidden]. Raises Problem."""
        scaling, name = self.settings.scaling, f"{self.module}.scaling"
        if scaling == "learned":
            return self.source.reader.take(name, (1,), wide=True)[0]
        if scaling == "channel":
            return self.source.reader.take(name, (self.source.base.hidden_size,), wide=True)
        assert not isinstance(scaling, str)
        return torch.tensor(scaling, dtype=torch.float32)

    def _check_finite(self, up: torch.Tensor, up_bias: torch.Tensor | None, scaling: torch.Tensor) -> None:
        """Raise Problem if a projection's weight and bias don't stay finite when scaled."""
        largest = scaling.abs().max() * max(1.0, float(up.abs().max()))
        if not largest.isfinite() or not (up_bias is None or (up_bias * scaling).isfinite().all()):
            raise Problem(f"the scaling makes weights of {self.module} infinite")


def _fold_norm(
    down: torch.Tensor, down_bias: torch.Tensor | None, norm_weight: torch.Tensor, norm_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`D (g x + b) + d` is `(D g) x + (D b + d)`; all float32."""
    bias = down @ norm_bias
    return down * norm_weight, bias if down_bias is None else bias + down_bias


def _without_prelu(primitive: Bottleneck, slope: float) -> Bottleneck:
    down, down_bias, up = without_prelu(primitive.down, primitive.down_bias, primitive.up, slope)
    return dataclasses.replace(primitive, down=down, down_bias=down_bias, up=up, activation="relu")
