"""The Triton kernels of the CUDA side path, under Triton's interpreter and through its compiler.

Neither needs a GPU, and neither shows that the kernels run on one.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polygraft.core.adapter_weights import ModuleChange, by_module
from polygraft.core.primitives import Kron, LowRank, Rotation, Scale
from polygraft.layers import cuda
from polygraft.layers import operators as operators_module
from polygraft.layers.linear.low_rank import AdaptedLinear
from polygraft.layers.linear.low_rank_bank import LowRankBank, Run
from polygraft.layers.linear.wide_head import WideLinear
from polygraft.layers.native.kernels import WEIGHT_DTYPES, load_kernels
from polygraft.layers.native.structures import ENTRY, EntryStruct, as_int64
from polygraft.layers.operators import Operators, operators_for
from polygraft.layers.step import AttentionPlan, Segment, StepContext

# Beside the environment's packages, not among them: with triton there, torch imports it into every server,
# which then takes 160 MB more.
PACKAGES = Path(sys.prefix) / "triton"
TRITON = pytest.mark.skipif(
    not PACKAGES.is_dir() and importlib.util.find_spec("triton") is None,
    reason="triton is not installed; `make setup` does it on Linux",
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What rounding an output may cost: a unit in the last place, since the interpreter cuts bfloat16 off where
# a GPU rounds.
UNIT = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
PLAN = AttentionPlan(*[torch.zeros(1)] * 5)


@pytest.fixture(scope="module", autouse=True)
def triton_packages() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PACKAGES)
        yield


@pytest.fixture(scope="module")
def interpreted(triton_packages: None) -> Iterator[ModuleType]:
    """The module with interpreted kernels: a copy of its own, since `triton.jit` decides when it is loaded."""
    path = Path(cuda.__file__).with_name("triton_side_path.py")
    spec = importlib.util.spec_from_file_location("interpreted_side_path", path)
    assert spec is not None
    assert spec.loader is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The module as a server imports it, whatever ran before."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return importlib.import_module("polygraft.layers.cuda.triton_side_path")


class Layer:
    """One adapted module whose side path is interpreted, in a bank of its own."""

    def __init__(
        self, operators: ModuleType, width_in: int, width_out: int, dtype: torch.dtype = torch.float32
    ) -> None:
        torch.manual_seed(0)
        self.bare = nn.Linear(width_in, width_out, dtype=dtype).requires_grad_(False)
        model = nn.ModuleDict({"layer": self.bare})
        self.step = StepContext()
        triton = Operators(triton=operators.TritonSidePath())
        self.bank = LowRankBank(model, {"layer": False}, self.step, triton)
        layer = model["layer"]
        assert isinstance(layer, AdaptedLinear)
        self.adapted = layer

    def install(self, primitive: LowRank | None, scale: Scale | None = None) -> int:
        return self.bank.install({"layer": ModuleChange(primitive, scale)})

    def run(self, x: torch.Tensor, *depths: Sequence[Run]) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs [rows, out] of the kernels, and of the operator in torch in float32."""
        segments = self.bank.segments(*depths)
        self.step.begin(PLAN, segments, self.bank.segments([]), len(x))
        with torch.inference_mode():
            out = self.adapted(x[None])[0]
            reference = self.bare(x).float()
            self.adapted.slots.add_torch(x, reference, segments)
        self.step.end()
        return out, reference


def weights(
    rank: int, width_in: int, width_out: int, dtype: torch.dtype, *, bias: bool = False, seed: int = 0
) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(rank, width_in, generator=generator).to(dtype) / width_in**0.5,
        torch.randn(width_out, rank, generator=generator).to(dtype) / max(rank, 1) ** 0.5,
        torch.randn(width_out, generator=generator) if bias else None,
        scaling=1.7 - seed,
    )


def cut(lengths: Sequence[int], slots: Sequence[int]) -> list[tuple[int, int, int]]:
    """Neighbouring runs of these lengths, leaving out those of slot 0, the base."""
    runs, row = [], 0
    for length, slot in zip(lengths, slots, strict=True):
        if slot:
            runs.append((row, row + length, slot))
        row += length
    return runs


@TRITON
@given(
    parts=st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 64), st.booleans(), st.sampled_from(DTYPES)),
        min_size=1,
        max_size=5,
    ),
    base=st.sampled_from(DTYPES),
    width_in=st.sampled_from([1, 15, 64, 65, 150]),
    width_out=st.sampled_from([1, 5, 128, 130, 300]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_the_kernels_agree_with_torch(
    interpreted: ModuleType,
    parts: list[tuple[int, int, bool, torch.dtype]],
    base: torch.dtype,
    width_in: int,
    width_out: int,
    seed: int,
) -> None:
    """Parts are (rows, rank, bias, type of weights); without rank and bias they are the base's."""
    layer = Layer(interpreted, width_in, width_out, base)
    slots = [
        layer.install(weights(rank, width_in, width_out, kept, bias=bias, seed=i)) if rank or bias else 0
        for i, (_, rank, bias, kept) in enumerate(parts)
    ]
    lengths = [rows for rows, *_ in parts]
    x = torch.randn(sum(lengths), width_in, generator=torch.Generator().manual_seed(seed)).to(base)
    runs = cut(lengths, slots)
    out, reference = layer.run(x, runs)
    assert out.dtype == base
    assert torch.allclose(out.float(), reference, atol=1e-5, rtol=UNIT[base])
    untouched = torch.ones(len(x), dtype=torch.bool)
    for first, last, _ in runs:
        untouched[first:last] = False
    assert torch.equal(out[untouched], layer.bare(x)[untouched])


@TRITON
@pytest.mark.parametrize("kept", DTYPES)
@pytest.mark.parametrize("base", DTYPES)
def test_every_pair_of_types_against_the_formula(
    interpreted: ModuleType, base: torch.dtype, kept: torch.dtype
) -> None:
    layer = Layer(interpreted, 70, 140, base)
    w = weights(17, 70, 140, kept, bias=True)
    assert w.bias is not None
    x = torch.randn(9, 70).to(base)
    expected = layer.bare(x).double()
    delta = x[1:8].double() @ w.product.T.double() + w.bias
    expected[1:8] += delta
    out, _ = layer.run(x, [(1, 8, layer.install(w))])
    assert torch.allclose(out.double(), expected, atol=1e-5, rtol=UNIT[base])
    assert delta.abs().min(dim=0).values.max() > 0.1  # an operator that adds nothing would be seen


@TRITON
def test_an_adapter_without_weights_here_changes_nothing(interpreted: ModuleType) -> None:
    layer = Layer(interpreted, 20, 30)
    here, elsewhere = layer.install(weights(3, 20, 30, torch.float32)), layer.install(None)
    x = torch.randn(6, 20)
    out, _ = layer.run(x, [(0, 3, elsewhere), (3, 6, here)])
    bare = layer.bare(x)
    assert torch.equal(out[:3], bare[:3])
    assert (out[3:] - bare[3:]).abs().max() > 0.01


@TRITON
def test_several_adapters_of_a_row_act_in_their_order(interpreted: ModuleType) -> None:
    layer = Layer(interpreted, 70, 140)
    one, two = weights(5, 70, 140, torch.float32, bias=True), weights(18, 70, 140, torch.bfloat16, seed=1)
    factors = torch.randn(140)
    a, b = layer.install(one), layer.install(two)
    scale = layer.install(None, Scale(output=factors, after_bias=True))
    x = torch.randn(50, 70)
    out, reference = layer.run(
        x, [(0, 40, a, 0.5), (41, 50, scale)], [(20, 30, scale), (30, 40, b, -2.0)], [(20, 25, b)]
    )
    assert one.bias is not None
    of_a = 0.5 * (x @ one.product.T + one.bias)
    of_b = x @ two.product.T
    bare = layer.bare(x)
    expected = bare.clone()
    expected[:40] += of_a[:40]
    expected[20:30] *= factors
    expected[20:25] += of_b[20:25]
    expected[30:40] -= 2 * of_b[30:40]
    expected[41:] *= factors
    assert torch.allclose(out, expected, atol=1e-4, rtol=1e-5)
    assert torch.allclose(out, reference, atol=1e-4, rtol=1e-5)


@TRITON
@pytest.mark.parametrize("of_sum", [False, True])
def test_a_scale_acts_before_the_low_rank_or_behind_it(interpreted: ModuleType, of_sum: bool) -> None:
    layer = Layer(interpreted, 70, 140)
    w, factors = weights(5, 70, 140, torch.bfloat16), torch.randn(140)
    slot = layer.install(w, Scale(output=factors, of_sum=of_sum))
    x = torch.randn(9, 70)
    out, reference = layer.run(x, [(2, 9, slot)])
    expected = layer.bare(x)
    product, added = expected[2:] - layer.bare.bias, x[2:] @ w.product.T
    changed = (product + added) * factors if of_sum else product * factors + added
    expected[2:] = changed + layer.bare.bias
    assert torch.allclose(out, expected, atol=1e-4, rtol=1e-5)
    assert torch.allclose(out, reference, atol=1e-4, rtol=1e-5)


@TRITON
def test_a_heads_sums_stay_in_float32(interpreted: ModuleType) -> None:
    layer = Layer(interpreted, 70, 140, torch.bfloat16)
    layer.adapted.base_layer = WideLinear(layer.bare)
    w = weights(5, 70, 140, torch.bfloat16)
    x = torch.randn(9, 70).bfloat16()
    segments = layer.bank.segments([(0, 9, layer.install(w))])
    layer.step.begin(PLAN, segments, segments, 9)
    with torch.inference_mode():
        out = layer.adapted(x[None])[0]
    layer.step.end()
    exact = x.double() @ (layer.bare.weight.double() + w.product.double()).T + layer.bare.bias.double()
    assert out.dtype == torch.float32
    assert torch.allclose(out.double(), exact, atol=1e-4, rtol=1e-5)


@TRITON
@pytest.mark.parametrize("base", DTYPES)
def test_what_is_left_to_torch_stands_in_its_place(interpreted: ModuleType, base: torch.dtype) -> None:
    layer = Layer(interpreted, 24, 30, base)
    kron = Kron(torch.randn(5, 4), torch.randn(6, 6))
    turn = Rotation(torch.linalg.qr(torch.randn(6, 4, 4)).Q)
    low_rank = weights(3, 24, 30, torch.float32)
    both = layer.bank.install(by_module(low_rank={"layer": low_rank}, kron={"layer": kron}))
    turned = layer.bank.install(
        by_module(scale={"layer": Scale(input=torch.randn(24))}, rotation={"layer": turn})
    )
    x = torch.randn(40, 24).to(base)
    segments = layer.bank.segments([(0, 20, both, 0.5), (25, 40, turned)], [(3, 7, turned)])
    assert segments.max_rank == 3  # nothing of the others is in the kernels' scratch
    out, _ = layer.run(x, [(0, 20, both, 0.5), (25, 40, turned)], [(3, 7, turned)])
    scale = layer.adapted.slots._weights[turned].in_scale
    rotated = (x.float() * scale) @ torch.block_diag(*turn.blocks)
    read = x.float().clone()
    read[3:7], read[25:] = rotated[3:7], rotated[25:]
    expected = layer.bare(read.to(base)).float()
    added = x.float() @ (torch.kron(kron.w1, kron.w2) + low_rank.product).T
    expected[:20] += 0.5 * added[:20]
    assert torch.allclose(
        out.float(), expected, atol=1e-4 if base == torch.float32 else 0.3, rtol=4 * UNIT[base]
    )
    assert torch.equal(out[20:25], layer.bare(x)[20:25])


@TRITON
def test_a_slot_is_used_again_and_the_bank_grows(interpreted: ModuleType) -> None:
    layer = Layer(interpreted, 20, 12)
    old = layer.install(weights(40, 20, 12, torch.float32, bias=True))
    layer.bank.remove(old)
    slots = [layer.install(weights(1 + i, 20, 12, torch.float32, seed=i)) for i in range(20)]
    assert slots[0] == old
    x = torch.randn(20, 20)
    out, reference = layer.run(x, [(row, row + 1, slot) for row, slot in enumerate(slots)])
    assert torch.allclose(out, reference, atol=1e-5)


@TRITON
def test_nan_in_one_segment_reaches_no_other(interpreted: ModuleType) -> None:
    layer = Layer(interpreted, 16, 80)
    good = layer.install(weights(4, 16, 80, torch.float32))
    bad = layer.install(LowRank(torch.full((4, 16), torch.nan), torch.zeros(80, 4)))
    x = torch.randn(6, 16)
    out, reference = layer.run(x, [(0, 2, good), (2, 4, bad), (4, 6, good)])
    assert out[2:4].isnan().all()
    assert torch.allclose(out[[0, 1, 4, 5]], reference[[0, 1, 4, 5]], atol=1e-5)


@TRITON
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_read_beyond_a_slots_own_rank(
    interpreted: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Neighbours of both weights in memory are NaN, and so is the scratch between the kernels.
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **how: empty(*size, **how).fill_(torch.nan))
    a, b = torch.full((40, 33), torch.nan, dtype=dtype), torch.full((40, 50), torch.nan, dtype=dtype)
    w = weights(5, 33, 50, dtype)
    a[:5], b[:5] = w.a, w.b.T
    wide = weights(40, 33, 50, dtype, seed=1)
    wide_b = wide.b.T.contiguous()
    entries = [
        EntryStruct(a=a, b=b, rank=rank, dtype=WEIGHT_DTYPES[dtype], scaling=0.5)
        for a, b, rank in [
            (0, 0, 0),
            (a.data_ptr(), b.data_ptr(), 5),
            (wide.a.data_ptr(), wide_b.data_ptr(), 40),
        ]
    ]
    table = torch.stack([as_int64(entry) for entry in entries])
    operators = interpreted.TritonSidePath()
    x, out = torch.randn(8, 33), torch.zeros(8, 50)
    one = torch.tensor(1.0).view(torch.int32).item()
    tiles = torch.tensor([(0, 4, 1, one, 0), (5, 8, 2, one, 0)], dtype=torch.int32)
    operators.add(x, out, table, tiles, 40)
    expected = torch.zeros(8, 50)
    expected[:4] = 0.5 * x[:4] @ w.a.float().T @ w.b.float().T
    expected[5:] = 0.5 * x[5:] @ wide.a.float().T @ wide.b.float().T
    assert torch.allclose(out, expected, atol=1e-5)


@TRITON
def test_inputs_that_arent_contiguous(interpreted: ModuleType) -> None:
    layer = Layer(interpreted, 24, 30)
    slot = layer.install(weights(3, 24, 30, torch.float32))
    out, reference = layer.run(torch.randn(24, 5).t(), [(0, 5, slot)])
    assert torch.allclose(out, reference, atol=1e-5)


@TRITON
def test_tiles_cover_each_run_once(interpreted: ModuleType) -> None:
    runs = [Segment(0, 1, 3), Segment(1, 1, 4), Segment(2, 34, 5, 0.5, 7), Segment(40, 57, 3)]
    tiles = interpreted.TritonSidePath().tiles(runs)
    assert [tile[:3] for tile in tiles] == [(0, 1, 3), (2, 18, 5), (18, 34, 5), (40, 56, 3), (56, 57, 3)]
    assert [tile[3:] for tile in tiles] == [(1.0, 0), (0.5, 7), (0.5, 7), (1.0, 0), (1.0, 0)]
    assert interpreted.TritonSidePath().tiles([]) == []


@TRITON
@pytest.mark.parametrize(
    ("dtype", "capability", "aligned"),
    [("fp32", 80, True), ("bf16", 80, True), ("fp16", 80, True), ("bf16", 90, True), ("bf16", 90, False)],
)
@pytest.mark.parametrize("name", ["shrink", "expand"])
def test_the_kernels_compile_for_a_gpu(
    compiled: ModuleType, name: str, dtype: str, capability: int, aligned: bool
) -> None:
    # The interpreter takes what the compiler refuses, such as a variable that has another type in each branch.
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = getattr(compiled, name)
    types = {"x": f"*{dtype}", "out": f"*{dtype}", "h": "*fp32", "tiles": "*i32", "table": "*i64"}
    tiles = [ENTRY, compiled.TILE_ROWS, compiled.TILE_RANK]
    tiles.append(compiled.TILE_IN if name == "shrink" else compiled.TILE_OUT)
    constants = dict(zip(kernel.arg_names[-4:], tiles, strict=True))
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32")
        for argument in kernel.arg_names
    }
    # What a launch finds out by itself: addresses and widths that 16 divides.
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(kernel.arg_names)
        if aligned and argument not in {*constants, "max_rank"}
    }
    source = triton.compiler.ASTSource(kernel, signature, constants, divisible)
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


def test_a_cpu_keeps_its_operators_and_leaves_the_kernels_alone() -> None:
    cpu = torch.device("cpu")
    assert operators_for(cpu) == Operators(load_kernels(), None, packs=True)
    assert operators_for(cpu, native=False) == Operators(packs=True)
    # torch itself imports triton where it is installed, so our own module is what to look for.
    code = (
        "import sys, torch\n"
        "from polygraft.layers.linear.low_rank_bank import LowRankBank\n"
        "from polygraft.layers.operators import operators_for\n"
        "from polygraft.layers.step import StepContext\n"
        "model = torch.nn.ModuleDict({'layer': torch.nn.Linear(4, 4)})\n"
        "LowRankBank(model, {'layer': False}, StepContext(), operators_for(torch.device('cpu')))\n"
        "sys.exit('polygraft.layers.cuda.triton_side_path' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@TRITON
def test_cuda_gets_the_kernels(compiled: ModuleType) -> None:
    operators_module._triton.cache_clear()
    found = operators_for(torch.device("cuda"))
    assert found.kernels is None
    assert isinstance(found.triton, compiled.TritonSidePath)
    assert operators_for(torch.device("cuda"), native=False) == Operators(sums_widely=True)


def test_cuda_without_triton_gets_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "polygraft.layers.cuda.triton_side_path", raising=False)
    operators_module._triton.cache_clear()
    assert operators_for(torch.device("cuda")) == Operators(sums_widely=True)
    operators_module._triton.cache_clear()
    assert "no Triton" in caplog.text


@TRITON
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(compiled: ModuleType, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    bare = nn.Linear(200, 300, dtype=dtype, device="cuda").requires_grad_(False)
    model, step = nn.ModuleDict({"layer": bare}), StepContext()
    bank = LowRankBank(model, {"layer": False}, step, operators_for(torch.device("cuda")))
    slots = [
        bank.install(by_module(low_rank={"layer": weights(r, 200, 300, dtype, bias=r == 8, seed=r)}))
        for r in (1, 8, 64)
    ]
    x = torch.randn(80, 200, dtype=dtype, device="cuda")
    segments = bank.segments(cut([1, 3, 40, 36], [slots[0], 0, *slots[1:]]))
    step.begin(PLAN, segments, bank.segments([]), len(x))
    layer = model["layer"]
    assert isinstance(layer, AdaptedLinear)
    with torch.inference_mode():
        out, reference = layer(x), bare(x).float()
        layer.slots.add_torch(x, reference, segments)
    assert torch.equal(out[1:4], bare(x)[1:4])
    assert torch.allclose(out.float(), reference, atol=1e-4, rtol=UNIT[dtype])
