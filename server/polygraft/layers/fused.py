"""C++ operators for a base's small modules, which torch runs as half a dozen operations each.

`base/optimize/fusing.py` decides which modules they replace, and checks the results.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from polygraft.layers.native.kernels import DTYPES, Kernels

ACTIVATIONS = ("silu", "gelu_tanh")
Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class FusedRmsNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * scale`, in float32 and rounded once.

    Args:
        weight: [width], as in the checkpoint.
        offset: added to the weight: 1 for Gemma's norms.
    """

    def __init__(self, weight: torch.Tensor, eps: float, kernels: Kernels, offset: float = 0.0) -> None:
        super().__init__()
        # Not a parameter, so that it stays in float32 whatever type the model has.
        self.scale = weight.detach().float() + offset
        self.eps = eps
        self._offset = offset
        self._kernels = kernels

    def with_weight(self, weight: torch.Tensor) -> FusedRmsNorm:
        """Return the same norm with another weight [width]."""
        return FusedRmsNorm(weight, self.eps, self._kernels, self._offset)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the weight takes."""
        return self.scale.nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] to the same."""
        x = x.contiguous()
        out = torch.empty_like(x)
        width = x.shape[-1]
        self._kernels.rms_norm(
            DTYPES[x.dtype], x.data_ptr(), x.numel() // width, width, self.scale.data_ptr(), self.eps,
            out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out


class FusedMlp(nn.Module):
    """`down_proj(activation(gate_proj(x)) * up_proj(x))`.

    Args:
        activation: index in ACTIVATIONS.
    """

    def __init__(
        self,
        gate_proj: nn.Module,
        up_proj: nn.Module,
        down_proj: nn.Module,
        activation: int,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.activation = activation
        self._kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to the same."""
        out: torch.Tensor = self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))
        return out

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return `activation(gate) * up`; a contiguous `gate` is overwritten with it."""
        gate, up = gate.contiguous(), up.contiguous()
        self._kernels.gate(
            DTYPES[gate.dtype], gate.data_ptr(), up.data_ptr(), gate.numel(), self.activation,
            gate.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return gate


def fused_rotate(original: Rotate, kernels: Kernels) -> Rotate:
    """Return `apply_rotary_pos_emb` in one pass; calls that the operator can't compute go to the original."""

    def rotate(
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if args or kwargs or q.dim() != 4 or q.shape[0] != 1 or not _can_rotate(q, k, cos, sin):
            return original(q, k, cos, sin, *args, **kwargs)
        return one(q, cos, sin), one(k, cos, sin)

    def one(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        _, heads, rows, dim = x.shape
        out = torch.empty(1, rows, heads, dim, dtype=x.dtype)
        kernels.rotate(
            DTYPES[x.dtype], x.data_ptr(), x.stride(2), x.stride(1), rows, heads, dim, cos.data_ptr(),
            sin.data_ptr(), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out.transpose(1, 2)

    return rotate


def _can_rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    rows, dim = q.shape[2:]
    return (
        q.dtype in DTYPES
        and q.dtype == k.dtype == cos.dtype == sin.dtype
        and q.stride(3) == k.stride(3) == 1
        and k.shape[2:] == (rows, dim)
        and cos.shape == sin.shape == (1, rows, dim)
        and cos.is_contiguous()
        and sin.is_contiguous()
        and dim % 2 == 0
    )
