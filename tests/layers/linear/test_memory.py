"""Memory for weights: one piece, in large pages where there are any, and moved without a change."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from polygraft.base.loader import load_base
from polygraft.base.optimize.packing import gather_weights, pack_linears
from polygraft.layers.linear import memory
from polygraft.layers.linear.linear import PackedLinear, Quantization
from polygraft.layers.linear.memory import LARGE_PAGE, Arena, allocate
from polygraft.layers.native.kernels import load_kernels

needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")


@pytest.mark.parametrize("nbytes", [0, 1, LARGE_PAGE - 1, LARGE_PAGE, 3 * LARGE_PAGE + 5])
def test_memory_can_be_written_from_end_to_end(nbytes: int) -> None:
    piece = allocate(nbytes)
    assert piece.dtype is torch.uint8
    assert piece.shape == (nbytes,)
    piece.fill_(7)
    assert piece.sum() == 7 * nbytes


def test_only_whole_large_pages_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Watched(mmap.mmap):
        def madvise(self, option: int, start: int = 0, length: int = 0) -> None:
            assert option == mmap.MADV_HUGEPAGE
            asked.append((start, length))

    monkeypatch.setattr(memory.mmap, "mmap", Watched)
    piece = allocate(2 * LARGE_PAGE + 4096)
    assert piece.data_ptr() % LARGE_PAGE == 0
    assert [length for _, length in asked] == [2 * LARGE_PAGE]


def test_a_system_without_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(memory.mmap, "MADV_HUGEPAGE")
    assert allocate(LARGE_PAGE).shape == (LARGE_PAGE,)


def test_a_kernel_that_refuses_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, option: int, start: int = 0, length: int = 0) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(memory.mmap, "mmap", Refusing)
    assert allocate(LARGE_PAGE).shape == (LARGE_PAGE,)


def test_an_arena_holds_copies_side_by_side() -> None:
    tensors = [
        torch.randn(3, 5),
        torch.randint(0, 255, (7,)).byte(),
        torch.randn(2, 2).bfloat16(),
        torch.ones(0),
    ]
    arena = Arena(iter(tensors))
    copies = [arena.copy(tensor) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        assert copy.dtype is tensor.dtype
        assert torch.equal(copy, tensor)
        assert copy.data_ptr() % 64 == copies[0].data_ptr() % 64
    places = [copy.data_ptr() for copy in copies[:-1]]
    assert places == sorted(places)
    assert places[-1] - places[0] < 256


class Model(nn.Module):
    """Modules that read one input, and one behind them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(64, 40, dtype=dtype), nn.Linear(64, 33, bias=False, dtype=dtype)
        self.o = nn.Linear(64, 64, dtype=dtype)

    def forward(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        return self.q(x), self.k(x), self.o(x)


@needs_kernels
@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_moved_multiply_as_before(dtype: torch.dtype, quantization: Quantization) -> None:
    model = Model(dtype)
    pack_linears(model, [["q", "k"], ["o"]], dict.fromkeys("qko", quantization))
    assert isinstance(model.q, PackedLinear)
    x = torch.randn(5, 64).to(dtype)
    with torch.inference_mode():
        before, weight = model(x), model.k.weight
        gather_weights(model)
        assert all(map(torch.equal, model(x.clone()), before))
        assert torch.equal(model.k.weight, weight)


@needs_kernels
def test_a_bases_weights_lie_in_the_order_of_a_step(llama: Path) -> None:
    base = load_base(str(llama), dtype="float32")
    groups = dict.fromkeys(m.group for m in base.model.modules() if isinstance(m, PackedLinear))
    places = [(tensor.data_ptr(), tensor.nbytes) for group in groups for tensor in group.tensors]
    assert places == sorted(places)
    assert places[-1][0] + places[-1][1] - places[0][0] < sum(size for _, size in places) + 64 * len(places)
