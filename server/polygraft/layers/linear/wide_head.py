"""The output head's product in torch, with its sums in float32.

torch rounds a product to its operands' type, so in bfloat16 logits of about 16 lie on a grid of 0.125: tokens
tie that shouldn't, and log-probabilities are off by as much. Where our own operator computes the head,
`LinearGroup` keeps the sums in float32; this module does so elsewhere.
"""

from __future__ import annotations

import torch
from torch import nn

from polygraft.layers.operators import operators_for

_PIECE = 2**20
"""Weights widened at a time: few enough to stay in a core's cache."""


class WideLinear(nn.Linear):
    """A linear module with 16-bit weights and float32 outputs.

    Args:
        plain: the module that it replaces and shares parameters with.
    """

    def __init__(self, plain: nn.Linear) -> None:
        # On the meta device: the parameters are replaced right away and should take no memory.
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight, self.bias = plain.weight, plain.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to float32 [..., out_features]."""
        return wide_product(x, self.weight, self.bias)


def wide_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias`, float32 [..., out_features].

    Args:
        x: [..., in_features], in the type of the weight [out_features, in_features].
    """
    if weight.dtype == torch.float32:
        return nn.functional.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if operators_for(rows.device).sums_widely:
        out = torch.mm(rows, weight.t(), out_dtype=torch.float32)
    else:
        # On a CPU, products of 16-bit operands are rounded to 16 bits, so the weights are widened piecewise.
        out = torch.empty(len(rows), len(weight), dtype=torch.float32, device=x.device)
        rows = rows.float()
        step = max(1, _PIECE // weight.shape[1])
        for first in range(0, len(weight), step):
            piece = weight[first : first + step].float()
            out[:, first : first + step] = rows @ piece.t()
    if bias is not None:
        out += bias.float()
    return out.view(*x.shape[:-1], len(weight))
