"""Linear modules whose weights lie in memory as oneDNN's CPU kernels read them.

The same products as torch's own linear, which brings the weights into that order again at every call: with
16 rows it takes 1.6 times as long in bfloat16 and twice as long in float32 (one product of 576 by 1536, two
threads of a CPU with AVX-512). The values don't change; in bfloat16 the results are bitwise the same.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class PackedLinear(nn.Module):
    """`x @ weight.T + bias` for [..., in_features], without autograd.

    Args:
        weight: [out_features, in_features] on the CPU, in float32 or bfloat16; not kept.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # Not a parameter: the order is oneDNN's own, so it can be neither saved nor moved.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        if x.numel() == 0:  # oneDNN has no product without rows
            return x.new_empty(*x.shape[:-1], self.out_features)
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


def pack_linears(model: nn.Module, names: Iterable[str]) -> int:
    """Replace the named plain linear modules in place where this machine's kernels gain by it.

    Quantized modules stay as they are, and so does a tied partner: the embedding keeps its own copy.

    Returns:
        How many were replaced.
    """
    packed = 0
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear | Conv1D) or type(module) not in (nn.Linear, Conv1D):
            continue  # a quantized one is a subclass
        if not _can_pack(module.weight):
            continue
        weight: torch.Tensor = module.weight.detach()
        bias: torch.Tensor | None = module.bias
        parent, _, child = name.rpartition(".")
        replacement = PackedLinear(weight.t() if isinstance(module, Conv1D) else weight, bias)
        setattr(model.get_submodule(parent), child, replacement)
        packed += 1
    return packed


def own_parameters(model: nn.Module) -> None:
    """Copy the parameters that are left out of the checkpoint's file mapping.

    While one of them is mapped the whole file stays so: it counts as the process's memory a second time, and
    a file that is replaced in place would change or kill a running server.
    """
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:  # a quantized one isn't mapped, and its bytes aren't ours to move
            parameter.data = parameter.data.clone()


def _can_pack(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call] # torch's own
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
