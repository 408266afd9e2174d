"""The primitives that act on the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

LAYER_NORM_EPSILON = 1e-5  # torch's default, which AdapterHub leaves as it is


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """Adapter tuning (arXiv 1902.00751) where a layer adds a part's output h to the residual stream r.

    With `A(x) = scaling * up act(down x + down_bias) + up_bias`, the stream behind the site becomes
    `residual * r + h + A(x)`, or with `norm_after` `residual * r + norm(A(x) + inside) + outside`.

    Args:
        down: [width, hidden_size]
        up: [hidden_size, width]
        activation: one of `layers.activations.ACTIVATIONS`.
        reads: x: "sum" is r + h, "output" h, "residual" r.
        down_bias: [width] or None.
        up_bias: [hidden_size] or None; the scaling is in it.
        normalizes: x is brought to mean 0 and variance 1 first, with `LAYER_NORM_EPSILON`; the norm's own
            weight and bias are folded into `down` and `down_bias`.
        residual: how often r is in the stream afterwards: 1, or 0 or 2 in unusual configurations.
        norm_after: what the result goes through, or None.
        scaling: apart from `up`, as a `LowRank`'s is from B.
    """

    down: torch.Tensor
    up: torch.Tensor
    activation: str
    reads: Literal["sum", "output", "residual"]
    down_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    normalizes: bool = False
    residual: float = 1.0
    norm_after: NormAfter | None = None
    scaling: float = 1.0

    @property
    def width(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]


@dataclass(frozen=True, slots=True)
class NormAfter:
    """A layer norm behind a `Bottleneck`.

    Args:
        weight, bias: [hidden_size]
        skip: what is added to the bottleneck's result: h ("output") or r + h ("sum").
        inside: whether it is added before the norm.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    skip: Literal["output", "sum"]
    inside: bool


@dataclass(frozen=True, slots=True)
class Coupling:
    """An invertible adapter (arXiv 2005.00052): NICE's additive coupling behind the embeddings, inverted
    before the head. Each half is changed by `F(x) = up act(down x + down_bias) + up_bias` of the other.

    Forwards `a += F(b); b += G(a)` for the halves a, b of the hidden state; backwards `b -= G(a); a -= F(b)`.

    Args:
        f, g: their layers.
        activation: one of `layers.activations.ACTIVATIONS`.
        inverted: whether it is; some models only have the coupling behind the embeddings.
    """

    f: CouplingLayers
    g: CouplingLayers
    activation: str
    inverted: bool = True


@dataclass(frozen=True, slots=True)
class CouplingLayers:
    """One half's function.

    Args:
        down: [width, hidden_size / 2]
        down_bias: [width]
        up: [hidden_size / 2, width]
        up_bias: [hidden_size / 2]
    """

    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor
