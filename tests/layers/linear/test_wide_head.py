"""The head's product in torch keeps its sums in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polygraft.layers.linear import wide_head
from polygraft.layers.linear.wide_head import WideLinear, wide_product

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 24), (1, 5, 24), (1, 0, 24), (1, 1, 24)])
@pytest.mark.parametrize("biased", [False, True])
def test_the_sums_are_not_rounded(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wide_head, "_PIECE", 7 * 24)  # the last piece is smaller
    torch.manual_seed(0)
    x = torch.randn(shape).to(device, dtype)
    weight, bias = torch.randn(40, 24).to(device, dtype), torch.randn(40).to(device, dtype)
    out = wide_product(x, weight, bias if biased else None)
    exact = x.double() @ weight.double().t() + (bias.double() if biased else 0.0)
    assert out.dtype == torch.float32
    assert out.shape == (*shape[:-1], 40)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)


def test_a_module_shares_its_parameters() -> None:
    plain = nn.Linear(24, 40, dtype=torch.bfloat16).requires_grad_(False)
    wide = WideLinear(plain)
    assert wide.weight is plain.weight
    assert wide.bias is plain.bias
    assert (wide.in_features, wide.out_features) == (24, 40)
    x = torch.randn(3, 24).bfloat16()
    assert torch.equal(wide(x).bfloat16(), wide_product(x, plain.weight, plain.bias).bfloat16())
    torch.testing.assert_close(wide(x), plain(x).float(), atol=0.02, rtol=0.01)
