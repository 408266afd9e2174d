"""The output head's product in torch, with its sums in float32.

torch rounds a product to the type of what it multiplies, so a model in bfloat16 gives logits of 16 on a grid
of 0.125: tokens tie that shouldn't, and log-probabilities are off by as much. Where our own operator computes
the head, `LinearGroup` keeps the sums as they are; this does it elsewhere.
"""

from __future__ import annotations

import torch
from torch import nn

_PIECE = 2**20
"""Weights that are widened at a time: they stay in a core's cache."""


class WideLinear(nn.Linear):
    """A linear module of 16 bits whose outputs are in float32.

    Args:
        plain: what it is made of, and shares the parameters with.
    """

    def __init__(self, plain: nn.Linear) -> None:
        # On meta, so that no memory is taken for parameters that are replaced right away.
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
    if rows.is_cuda:
        out = torch.mm(rows, weight.t(), out_dtype=torch.float32)
    else:
        # A CPU's products of 16 bits give 16 bits, so the weights are widened, a piece at a time.
        out = torch.empty(len(rows), len(weight), dtype=torch.float32, device=x.device)
        rows = rows.float()
        step = max(1, _PIECE // weight.shape[1])
        for first in range(0, len(weight), step):
            piece = weight[first : first + step].float()
            out[:, first : first + step] = rows @ piece.t()
    if bias is not None:
        out += bias.float()
    return out.view(*x.shape[:-1], len(weight))
