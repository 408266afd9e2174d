"""int8 linear modules in torch: the reference for the C++ operator, and what serves without a compiler."""

from __future__ import annotations

import torch
from torch import nn

from polygraft.layers.linear.int8_panels import quantize_int8

_LEAST_INPUTS = 2
"""With a single one torch's products are wrong on processors with VNNI (seen in 2.13.0)."""


class Int8Linear(nn.Module):
    """Products of int8 weights and int8 rows, each column and each row by its largest value.

    LLM.int8() without outliers (arXiv 2208.07339): bitsandbytes' `Linear8bitLt` with threshold 0, whose
    default threshold would make a row's result depend on its neighbours.

    Args:
        weight: [out_features, in_features]; not kept.
        wide: outputs are float32, as the head's, rather than of the rows' type.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, wide: bool = False) -> None:
        super().__init__()
        self.wide = wide
        self.out_features, self.in_features = weight.shape
        quantized, self._scale = quantize_int8(weight)
        self._fill = (0, max(0, _LEAST_INPUTS - self.in_features))
        self._quantized = nn.functional.pad(quantized, self._fill).t().contiguous()
        self._dtype = weight.dtype
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        rows = x.reshape(-1, self.in_features).float()
        scale = rows.abs().amax(1, keepdim=True) / 127
        # A row with NaN or infinity keeps it in its scale.
        whole = (rows / scale).nan_to_num(0.0).round().to(torch.int8)
        whole = nn.functional.pad(whole, self._fill)
        out = torch._int_mm(whole, self._quantized).float() * scale * self._scale
        if self.bias is not None:
            out += self.bias.float()
        return (out if self.wide else out.to(x.dtype)).view(*x.shape[:-1], self.out_features)

    @property
    def weight(self) -> torch.Tensor:
        """A copy of the weight [out_features, in_features], dequantized."""
        return (self._quantized[: self.in_features].t() * self._scale[:, None]).to(self._dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the weight takes."""
        return self._quantized.nbytes + self._scale.nbytes
