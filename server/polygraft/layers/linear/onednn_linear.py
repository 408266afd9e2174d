"""Linear modules whose weights lie in memory as oneDNN's CPU kernels read them.

For machines without a compiler. The same products as torch's own linear, which brings the weights into that
order again at every call: with 16 rows it takes 1.6 times as long in bfloat16 and twice as long in float32
(one product of 576 by 1536, two threads of a CPU with AVX-512). The values don't change; in bfloat16 the
results are bitwise the same.
"""

from __future__ import annotations

import torch
from torch import nn


class OneDnnLinear(nn.Module):
    """`x @ weight.T + bias` for [..., in_features], without autograd.

    Args:
        weight: [out_features, in_features] on the CPU, in float32 or bfloat16; not kept.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # Not a parameter: the order is oneDNN's own, so it can be neither saved nor moved.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self._dtype = weight.dtype
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        if x.numel() == 0:  # oneDNN has no product without rows
            return x.new_empty(*x.shape[:-1], self.out_features)
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out

    def unpacked(self) -> torch.Tensor:
        """A copy of the weight [out_features, in_features]: what the unit vectors are mapped to."""
        unit = torch.eye(self.in_features, dtype=self._dtype)
        columns: torch.Tensor = torch.ops.mkldnn._linear_pointwise(unit, self.weight, None, "none", [], "")
        return columns.t().contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the weight takes."""
        return self.out_features * self.in_features * self._dtype.itemsize


def gains_by_onednn(weight: torch.Tensor) -> bool:
    """Whether this machine's kernels read a weight on the CPU faster in that order."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call] # torch's own
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
