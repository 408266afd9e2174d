"""The operators as AVX-512 computes them, with and without VNNI and BF16, on a processor that may have none of it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from polygraft.layers.linear.linear import LinearGroup, PackedLinear, Quantization
from polygraft.layers.native import build, kernels
from polygraft.layers.native.kernels import Kernels
from tests.engines import greedy, make_engine, run_greedy
from tests.layers.linear.test_linear import whole_rows

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or kernels.load_kernels() is None or build.instruction_sets() == [""],
    reason="needs g++ and an x86 processor",
)


EXTENSIONS = {"AVX-512": [], "VNNI": ["-DPOLYGRAFT_VNNI"], "BF16": ["-DPOLYGRAFT_VNNI", "-DPOLYGRAFT_BF16"]}


@pytest.fixture(scope="module", params=EXTENSIONS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("avx512") / "kernels.so"
    subprocess.run(
        [
            "g++", *build.FLAGS, "-O1", "-Wno-psabi", "-march=x86-64-v3", *EXTENSIONS[request.param],
            "-include", str(Path(__file__).with_name("avx512_in_software.h")),
            "-o", str(path), str(build.FOLDER / "kernels.cpp"), *map(str, build.torch_openmp()),
        ],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(path))


def products(
    operators: Kernels | None, weight: torch.Tensor, quantization: Quantization, x: torch.Tensor
) -> torch.Tensor:
    assert operators is not None
    out: torch.Tensor = PackedLinear(LinearGroup([weight], [None], operators, quantization), 0)(x)
    return out


@pytest.mark.parametrize("rows", [1, 11, 70])
@pytest.mark.parametrize("width_in", [64, 577])
def test_int8_products_are_exact(library: ctypes.CDLL, rows: int, width_in: int) -> None:
    assert Kernels(library).panel == 32
    x = torch.cat([whole_rows(kind, rows, width_in) for kind in ("few large", "normal", "all largest")], 1)
    for kind in ("normal", "all positive"):
        weight = whole_rows(kind, 75, width_in)[0]
        assert torch.equal(
            products(Kernels(library), weight, "int8", x).double(), x.double() @ weight.double().t()
        )


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_products(library: ctypes.CDLL, dtype: torch.dtype, quantization: Quantization) -> None:
    weight = nn.Linear(640, 75).weight.detach().to(dtype)
    x = torch.randn(1, 30, 640).to(dtype)
    mine = products(Kernels(library), weight, quantization, x)
    theirs = products(kernels.load_kernels(), weight, quantization, x)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("rows", [1, 13])
@pytest.mark.parametrize("width_in", [64, 577])
def test_bfloat16_products_of_whole_numbers_are_exact(library: ctypes.CDLL, rows: int, width_in: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randint(-9, 10, (n, width_in), generator=generator).bfloat16() for n in (rows, 75))
    exact = x.double() @ weight.double().t()
    assert torch.equal(products(Kernels(library), weight, "none", x), exact.bfloat16())


def test_a_server(
    library: ctypes.CDLL, llama: Path, llama_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (None, "lora-bias", "prefix", "prompt", "lora-bias")
    requests = [greedy(str(at), list(range(at, 40)), name, 6) for at, name in enumerate(names)]
    expected = run_greedy(make_engine(llama, llama_store), requests)
    monkeypatch.setattr(build, "load", lambda: library)
    kernels.load_kernels.cache_clear()
    try:
        assert run_greedy(make_engine(llama, llama_store), requests) == expected
    finally:
        kernels.load_kernels.cache_clear()
