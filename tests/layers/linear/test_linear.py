"""Groups of packed linear modules, with and without side paths."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polygraft.core.adapter_weights import by_module
from polygraft.core.primitives import LowRank
from polygraft.layers.linear.four_bit_panels import quantize_4bit
from polygraft.layers.linear.int8_linear import Int8Linear
from polygraft.layers.linear.linear import LinearGroup, PackedLinear, Quantization
from polygraft.layers.linear.low_rank_bank import LowRankBank
from polygraft.layers.native.kernels import Kernels, load_kernels
from polygraft.layers.operators import operators_for
from polygraft.layers.step import AttentionPlan, StepContext

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]
PLAN = AttentionPlan(*[torch.zeros(1)] * 5)


def kernels() -> Kernels:
    loaded = load_kernels()
    assert loaded is not None
    return loaded


def packed(modules: list[nn.Linear], quantization: Quantization = "none") -> list[PackedLinear]:
    weights = [module.weight.detach() for module in modules]
    group = LinearGroup(weights, [module.bias for module in modules], kernels(), quantization)
    return [PackedLinear(group, i) for i in range(len(modules))]


def linears(width_in: int, widths: list[int], dtype: torch.dtype, *, bias: bool = True) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(width_in, w, bias=bias, dtype=dtype).requires_grad_(False) for w in widths]


@given(
    rows=st.integers(1, 200),
    width_in=st.sampled_from([1, 2, 5, 16, 33, 576, 577, 1300]),
    widths=st.lists(st.sampled_from([1, 15, 16, 33, 64, 100]), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_products_of_a_group(
    rows: int, width_in: int, widths: list[int], dtype: torch.dtype, bias: bool
) -> None:
    plain = linears(width_in, widths, dtype, bias=bias)
    x = torch.randn(1, rows, width_in, generator=torch.Generator().manual_seed(rows)).to(dtype)
    for mine, theirs in zip(packed(plain), plain, strict=True):
        exact = nn.functional.linear(
            x.double(), theirs.weight.double(), theirs.bias.double() if bias else None
        )
        out = mine(x)
        assert out.dtype is dtype
        # Rounded once, after a sum in float32.
        ulp = 2**-8 if dtype == torch.bfloat16 else 2**-20
        assert torch.allclose(out.double(), exact, atol=1e-5, rtol=ulp)


@given(
    rows=st.integers(1, 200),
    width_in=st.sampled_from([1, 2, 33, 64, 576, 1300]),
    widths=st.lists(st.sampled_from([1, 15, 33, 64]), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=40, deadline=None)
def test_int8_products_are_those_of_whole_numbers(
    rows: int, width_in: int, widths: list[int], dtype: torch.dtype
) -> None:
    plain = linears(width_in, widths, dtype)
    x = torch.randn(1, rows, width_in, generator=torch.Generator().manual_seed(rows)).to(dtype)
    x[0, 0] = 0
    for mine, theirs in zip(packed(plain, "int8"), plain, strict=True):
        reference = Int8Linear(theirs.weight, theirs.bias)
        assert torch.equal(mine.weight, reference.weight)
        # A value that lies between two whole numbers may be rounded otherwise.
        step = theirs.weight.abs().amax() * x.abs().amax() / 127
        tolerance = (
            float(step) if dtype == torch.float32 else float(step) + 2**-7 * float(mine(x).abs().amax())
        )
        assert (mine(x) - reference(x)).abs().max() <= tolerance


@pytest.mark.parametrize("width_in", [1, 2, 3])
def test_int8_products_in_torch_of_few_inputs(width_in: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randint(-9, 10, (n, width_in), generator=generator).float() for n in (15, 4))
    # The largest of each is 127, so that all stay whole.
    weight[:, 0] = x[:, 0] = 127.0
    module = Int8Linear(weight, None)
    assert torch.equal(module(x), x @ weight.t())
    assert torch.equal(module.weight, weight)


def whole_rows(kind: str, rows: int, width: int) -> torch.Tensor:
    """float32 [1, rows, width] of whole numbers, the largest of each row being 127 or -127."""
    generator = torch.Generator().manual_seed(rows + width)
    x = torch.randn(rows, width, generator=generator)
    if kind == "few large":
        x **= 5
    elif kind == "all largest":
        x = x.sign()
    elif kind == "all positive":
        x = torch.ones(rows, width)
    return (x * 127 / x.abs().amax(1, keepdim=True)).round()[None]


@pytest.mark.parametrize("kind", ["few large", "normal", "all largest", "all positive", "of every kind"])
@pytest.mark.parametrize("width_in", [1, 8, 33, 64, 577])
@pytest.mark.parametrize("rows", [1, 3, 8, 150])
def test_int8_products_are_exact(kind: str, width_in: int, rows: int) -> None:
    """However many products of bytes the operator may sum in 16 bits."""
    kinds = ["few large", "normal", "all largest", "all positive"] if kind == "of every kind" else [kind]
    x = torch.cat([whole_rows(kind, rows, width_in) for kind in kinds], 1)
    x = x[:, torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))].contiguous()
    for weights in ("normal", "all largest", "all positive"):
        module = nn.Linear(width_in, 45, bias=False).requires_grad_(False)
        module.weight.data = whole_rows(weights, 45, width_in)[0]
        (mine,) = packed([module], "int8")
        assert torch.equal(mine(x).double(), x.double() @ module.weight.double().t())
        assert torch.equal(mine.weight, module.weight)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("width_in", [64, 576, 1280])
def test_4_bit_products(width_in: int, rows: int, dtype: torch.dtype, kind: Quantization) -> None:
    plain = linears(width_in, [40, 7], dtype)
    x = torch.randn(1, rows, width_in, generator=torch.Generator().manual_seed(rows)).to(dtype)
    for mine, theirs in zip(packed(plain, kind), plain, strict=True):
        codes, scale, values = quantize_4bit(theirs.weight, kind, double=True)
        exact = values[codes.long()] * scale.repeat_interleave(64, 1)
        out = nn.functional.linear(x.double(), exact.double(), theirs.bias.double())
        assert torch.allclose(
            mine(x).double(), out, atol=1e-5, rtol=2**-8 if dtype == torch.bfloat16 else 2**-19
        )
        # And these are bitsandbytes' own weights.
        packed_weight, state = functional.quantize_4bit(
            theirs.weight, blocksize=64, quant_type=kind, compress_statistics=True
        )
        assert torch.equal(mine.weight, functional.dequantize_4bit(packed_weight, state))


def test_nan_and_infinity_stay_visible_and_in_their_rows() -> None:
    x = torch.randn(1, 9, 64)
    x[0, 2, 5], x[0, 7, 0] = torch.nan, torch.inf
    for quantization in ("none", "int8", "nf4"):
        (module,) = packed(linears(64, [40], torch.float32), quantization)
        finite = module(x)[0].isfinite().all(-1)
        assert finite.tolist() == [row not in (2, 7) for row in range(9)]


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_bitwise_the_same_whatever_the_number_of_rows(
    dtype: torch.dtype, quantization: Quantization
) -> None:
    (module,) = packed(linears(640, [70], dtype), quantization)
    x = torch.randn(230, 640).to(dtype)
    together = module(x)
    for rows in (1, 2, 5, 6, 7, 12, 13, 19, 48, 100):
        assert torch.equal(module(x[-rows:].contiguous()), together[-rows:])


@pytest.mark.parametrize("threads", [1, 3, 4, 8])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    module, _ = packed(linears(100, [40, 30], torch.float32))
    x = torch.randn(500, 100)
    outs = []
    before = torch.get_num_threads()
    for count in (2, threads):
        torch.set_num_threads(count)
        try:
            outs.append(module(x.clone()))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_comes_back_as_it_was(dtype: torch.dtype) -> None:
    plain = linears(33, [20, 7, 64], dtype)
    for mine, theirs in zip(packed(plain), plain, strict=True):
        assert torch.equal(mine.weight, theirs.weight)


def test_rows_of_another_type_are_refused() -> None:
    (module,) = packed(linears(4, [4], torch.float32))
    with pytest.raises(TypeError, match="float32"):
        module(torch.zeros(1, 4, dtype=torch.bfloat16))


def test_what_a_group_computed_for_one_input_isnt_handed_out_for_another() -> None:
    first, second = packed(linears(8, [5, 6], torch.float32))
    x, y = torch.randn(2, 8), torch.randn(2, 8)
    alone = second(y.clone())
    first(x)
    assert torch.equal(second(y), alone)
    assert not torch.equal(second(x), alone)
    # Asked twice for the same input, it computes again.
    again = first(x)
    x += 1
    assert not torch.equal(first(x), again)


class Attention(nn.Module):
    """Three modules on one input."""

    def __init__(self, modules: list[PackedLinear]) -> None:
        super().__init__()
        self.q, self.k, self.v = modules


def adapter(rank: int, width_in: int, width_out: int, dtype: torch.dtype, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(rank, width_in, generator=generator).to(dtype) / width_in**0.5,
        torch.randn(width_out, rank, generator=generator).to(dtype) / rank**0.5,
        torch.randn(width_out, generator=generator) if seed % 2 else None,
    )


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.parametrize("kept", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [6, 90])
def test_side_paths_are_those_of_the_operator_in_torch(
    rows: int, dtype: torch.dtype, kept: torch.dtype, quantization: Quantization
) -> None:
    plain = linears(64, [40, 24, 33], dtype)
    names = ["q", "k", "v"]
    outs = []
    for native in (True, False):
        model = Attention(packed(plain, quantization))
        step = StepContext()
        bank = LowRankBank(
            model, dict.fromkeys(names, False), step, operators_for(torch.device("cpu"), native=native)
        )
        width = dict(zip(names, (40, 24, 33), strict=True))
        # Adapters that target all, two and one of the three, of different ranks.
        slots = [
            bank.install(
                by_module(
                    low_rank={n: adapter(rank, 64, width[n], kept, rank + i) for i, n in enumerate(targets)}
                )
            )
            for rank, targets in ((4, names), (9, ["q", "v"]), (17, ["k"]))
        ]
        third = rows // 3
        runs = [(0, third, slots[0]), (third, third + 1, slots[1]), (2 * third, rows, slots[2])]
        step.begin(PLAN, bank.segments(runs), bank.segments([]), rows)
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
        with torch.inference_mode():
            outs.append([getattr(model, name)(x) for name in names])
        step.end()
        with torch.inference_mode():
            bare = [getattr(model, name)(x.clone()) for name in names]
        for mine, base in zip(outs[-1], bare, strict=True):
            untouched = slice(third + 1, 2 * third)
            assert torch.equal(mine[untouched], base[untouched])
            assert not torch.equal(mine, base)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for native_out, torch_out in zip(*outs, strict=True):
        assert torch.allclose(native_out.float(), torch_out.float(), atol=tolerance, rtol=tolerance)
