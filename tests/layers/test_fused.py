"""The small operations in C++ against their formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polygraft.layers.fused import ACTIVATIONS, FusedMlp, FusedRmsNorm, fused_rotate
from polygraft.layers.native.kernels import Kernels, load_kernels

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]
# Around the number of elements from which a team of threads shares the rows.
ROWS = [1, 3, 40, 700]


def kernels() -> Kernels:
    loaded = load_kernels()
    assert loaded is not None
    return loaded


def close(mine: torch.Tensor, exact: torch.Tensor) -> bool:
    ulp = 2**-8 if mine.dtype == torch.bfloat16 else 2**-20
    return torch.allclose(mine.double(), exact, rtol=ulp, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [1, 16, 33, 576])
def test_rms_norm(dtype: torch.dtype, rows: int, width: int) -> None:
    torch.manual_seed(rows)
    x, scale = (torch.randn(1, rows, width) * 3).to(dtype), torch.randn(width)
    out = FusedRmsNorm(scale, 1e-5, kernels())(x)
    wide = x.double()
    assert out.dtype is dtype
    assert close(out, wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * scale.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (40, 1536)])
def test_gate(dtype: torch.dtype, activation: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    x, up = (torch.randn(shape) * 8).to(dtype), torch.randn(shape).to(dtype)
    x.view(-1)[0] = -200.0
    formulas = {
        "silu": nn.functional.silu,
        "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    }
    exact = formulas[activation](x.double()) * up.double()
    identity = nn.Identity()
    mlp = FusedMlp(identity, identity, identity, ACTIVATIONS.index(activation), kernels())
    assert close(mlp.gated(x, up), exact)


def test_the_gated_feed_forward_is_put_together_as_it_says() -> None:
    torch.manual_seed(2)
    gate, up, down = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)
    x = torch.randn(1, 4, 6)
    with torch.inference_mode():
        out = FusedMlp(gate, up, down, ACTIVATIONS.index("silu"), kernels())(x)
        assert torch.allclose(out, down(nn.functional.silu(gate(x)) * up(x)), atol=1e-6)


def test_nan_and_infinity_stay_in_their_rows_and_visible() -> None:
    x = torch.randn(5, 32)
    x[1, 3], x[2, 7] = torch.nan, torch.inf
    norm = FusedRmsNorm(torch.ones(32), 1e-5, kernels())(x)
    assert norm.isfinite().all(-1).tolist() == [True, False, False, True, True]
    identity = nn.Identity()
    gated = FusedMlp(identity, identity, identity, 0, kernels()).gated(x.clone(), torch.ones_like(x))
    assert gated.isfinite().all(-1).tolist() == [True, False, False, True, True]


def rotated(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, as transformers has it."""

    def one(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        return x * cos.unsqueeze(unsqueeze_dim) + turned * sin.unsqueeze(unsqueeze_dim)

    return one(q), one(k)


@given(
    rows=st.sampled_from(ROWS),
    heads=st.sampled_from([(1, 1), (9, 3), (4, 4)]),
    dim=st.sampled_from([2, 6, 16, 64]),
    dtype=st.sampled_from(DTYPES),
    side_by_side=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_rotary_positions(
    rows: int, heads: tuple[int, int], dim: int, dtype: torch.dtype, side_by_side: bool
) -> None:
    generator = torch.Generator().manual_seed(rows)
    q, k = (
        torch.randn(1, rows, n, dim, generator=generator).to(dtype).transpose(1, 2)
        if side_by_side
        else torch.randn(1, n, rows, dim, generator=generator).to(dtype)
        for n in heads
    )
    cos, sin = (torch.randn(1, rows, dim, generator=generator).to(dtype) for _ in range(2))
    exact = rotated(q.double(), k.double(), cos.double(), sin.double())
    for out, expected in zip(fused_rotate(rotated, kernels())(q, k, cos, sin), exact, strict=True):
        assert out.shape == expected.shape
        assert close(out, expected)


@pytest.mark.parametrize("case", ["an option", "two sequences", "mixed types", "part of a head"])
def test_calls_that_the_operator_isnt_made_for_go_to_the_original(case: str) -> None:
    calls = []

    def original(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(case)
        return q, k

    q, k, cos, sin = (
        torch.randn(1, 4, 3, 8),
        torch.randn(1, 2, 3, 8),
        torch.randn(1, 3, 8),
        torch.randn(1, 3, 8),
    )
    rotate = fused_rotate(original, kernels())
    if case == "an option":
        rotate(q, k, cos, sin, unsqueeze_dim=2)
    elif case == "two sequences":
        rotate(q.expand(2, 4, 3, 8), k.expand(2, 2, 3, 8), cos, sin)
    elif case == "mixed types":
        rotate(q, k, cos.double(), sin.double())
    else:
        rotate(q, k, cos[..., :4].contiguous(), sin[..., :4].contiguous())
    assert calls == [case]
    rotate(q, k, cos, sin)
    assert calls == [case]
