"""Low-rank side paths on CUDA, as two Triton kernels.

IT HAS NOT RUN ON A GPU. tests/layers/cuda/test_triton_side_path.py runs the kernels under Triton's
interpreter, which checks their results, and compiles them for sm_80 and sm_90. Nothing is known of their
speed, and no tile has been tuned.

Shrink computes `h = weight scaling x A^T`, expand scales the outputs and adds `h B^T + weight bias` to them,
for rows in segments that use one adapter each; segments that share rows are in separate calls, one after the
other. A program handles one tile of one segment's rows and finds its adapter's weights by address and rank in
the module's table, the one that the C++ operator reads (native/side_path.h's `Entry`): no weights are
gathered, nothing is padded to the largest rank, and rows without an adapter are in no tile. Segments and the
two products are Punica's SGMV (arXiv 2310.18547), ranks that differ within a step are S-LoRA's MBGMM (arXiv
2311.03285), weights by their addresses in a tensor are vLLM's (vllm/lora/ops/triton_ops).

Import this module only where the kernels are to run; `operators_for` does.
"""

# Kernels' parameters have no types but constexpr, in upper case as Triton's own are; what triton decorates is
# untyped for mypy, which knows nothing of triton.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from polygraft.layers import step
from polygraft.layers.native import structures
from polygraft.layers.native.structures import ENTRY, entry_column

# One height for prefill and decode, so that a row's sums run in one order whatever its neighbours are.
TILE_ROWS = 16
TILE_RANK = 16  # the least that `tl.dot` sums over, as expand does
TILE_IN = 64  # with 128, float32's registers spill on sm_80 and sm_90 (ptxas -v, Triton 3.7.1)
TILE_OUT = 128
SEGMENT = tl.constexpr(step.SEGMENT)
# Where an adapter's entry in a module's table holds what the kernels read of it.
AT_A = tl.constexpr(entry_column("a"))
AT_B = tl.constexpr(entry_column("b"))
AT_BIAS = tl.constexpr(entry_column("bias"))
AT_RANK = tl.constexpr(entry_column("rank"))
AT_DTYPE = tl.constexpr(entry_column("dtype"))
AT_OUT_SCALE = tl.constexpr(entry_column("out_scale"))
AT_FLAGS = tl.constexpr(entry_column("flags"))
AT_SCALING = tl.constexpr(entry_column("scaling"))
SCALES_SUM = tl.constexpr(structures.SCALES_SUM)


@triton.jit
def _shrink_tile(
    x, x_mask, address, W: tl.constexpr, ranks, a_mask, in_features,
    ROWS: tl.constexpr, RANK: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """Sums float32 [ROWS, RANK] of x, pointers [ROWS, 1] to rows, with A's `ranks` [1, RANK], of type W."""
    a = tl.multiple_of(address.to(tl.pointer_type(W)), 16) + ranks * in_features
    sums = tl.full((ROWS, RANK), 0.0, tl.float32)
    for start in range(0, in_features, IN):
        columns = start + tl.arange(0, IN)
        inside = columns < in_features
        # Widened right after each load: the interpreter multiplies bfloat16 as whole numbers, and rows and
        # weights may be of different types. The default precision, tf32, would drop 13 bits of float32.
        rows = tl.load(x + columns[None, :], mask=x_mask & inside[None, :], other=0.0).to(tl.float32)
        weights = tl.load(a + columns[:, None], mask=a_mask & inside[:, None], other=0.0).to(tl.float32)
        sums = tl.dot(rows, weights, sums, input_precision="ieee")
    return sums


@triton.jit
def _expand_tile(
    h, h_mask, address, W: tl.constexpr, columns, b_mask, rank, width,
    ROWS: tl.constexpr, RANK: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Sums float32 [ROWS, OUT] of h, pointers [ROWS, 1] to rows, with B^T's `columns` [1, OUT], of type W."""
    b = tl.multiple_of(address.to(tl.pointer_type(W)), 16) + columns
    sums = tl.full((ROWS, OUT), 0.0, tl.float32)
    for start in range(0, rank, RANK):
        ranks = start + tl.arange(0, RANK)
        inside = ranks < rank
        shrunk = tl.load(h + ranks[None, :], mask=h_mask & inside[None, :], other=0.0)
        weights = tl.load(b + ranks[:, None] * width, mask=b_mask & inside[:, None], other=0.0).to(tl.float32)
        sums = tl.dot(shrunk, weights, sums, input_precision="ieee")
    return sums


# One form for all ranks: another one would be compiled in the middle of serving.
@triton.jit(do_not_specialize=["max_rank"])
def shrink(
    h, x, tiles, table, in_features, max_rank,
    ENTRY: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """h float32 [rows, max_rank] = weight scaling x [rows, in_features] A^T.

    A program for each (tile of rows, of ranks).
    """
    tile = tiles + tl.program_id(0) * SEGMENT
    entry = table + tl.load(tile + 2) * ENTRY
    rank = tl.load(entry + AT_RANK)
    start = tl.program_id(1) * RANK
    if start >= rank:
        return
    a = tl.load(entry + AT_A)
    dtype = tl.load(entry + AT_DTYPE)
    rows = tl.load(tile) + tl.arange(0, ROWS)
    h_mask = (rows < tl.load(tile + 1))[:, None]
    rows = rows.to(tl.int64)[:, None]  # times a width it may pass 2^31
    ranks = start + tl.arange(0, RANK)[None, :]
    a_mask = ranks < rank
    x += rows * in_features
    if dtype == 0:
        sums = _shrink_tile(x, h_mask, a, tl.float32, ranks, a_mask, in_features, ROWS, RANK, IN)
    elif dtype == 1:
        sums = _shrink_tile(x, h_mask, a, tl.bfloat16, ranks, a_mask, in_features, ROWS, RANK, IN)
    else:
        sums = _shrink_tile(x, h_mask, a, tl.float16, ranks, a_mask, in_features, ROWS, RANK, IN)
    scaling = tl.load(entry + AT_SCALING).to(tl.float64, bitcast=True).to(tl.float32)
    sums *= tl.load(tile + 3).to(tl.float32, bitcast=True) * scaling
    tl.store(h + rows * max_rank + tl.load(tile + 4) + ranks, sums, mask=h_mask & a_mask)


@triton.jit(do_not_specialize=["max_rank"])
def expand(
    out, h, tiles, table, width, max_rank,
    ENTRY: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """out [rows, width], scaled, += h [rows, max_rank] B^T + weight bias.

    A program for each (tile of rows, of columns).
    """
    tile = tiles + tl.program_id(0) * SEGMENT
    entry = table + tl.load(tile + 2) * ENTRY
    bias = tl.load(entry + AT_BIAS)
    rank = tl.load(entry + AT_RANK).to(tl.int32)
    scale = tl.load(entry + AT_OUT_SCALE)
    if (rank == 0) & (bias == 0) & (scale == 0):
        return
    b = tl.load(entry + AT_B)
    dtype = tl.load(entry + AT_DTYPE)
    rows = tl.load(tile) + tl.arange(0, ROWS)
    h_mask = (rows < tl.load(tile + 1))[:, None]
    rows = rows.to(tl.int64)[:, None]
    columns = tl.program_id(1) * OUT + tl.arange(0, OUT)[None, :]
    b_mask = columns < width
    h += rows * max_rank + tl.load(tile + 4)
    if dtype == 0:
        sums = _expand_tile(h, h_mask, b, tl.float32, columns, b_mask, rank, width, ROWS, RANK, OUT)
    elif dtype == 1:
        sums = _expand_tile(h, h_mask, b, tl.bfloat16, columns, b_mask, rank, width, ROWS, RANK, OUT)
    else:
        sums = _expand_tile(h, h_mask, b, tl.float16, columns, b_mask, rank, width, ROWS, RANK, OUT)
    to = out + rows * width + columns
    mask = h_mask & b_mask
    before = tl.load(to, mask=mask, other=0.0).to(tl.float32)
    if scale != 0:
        factors = tl.load(scale.to(tl.pointer_type(tl.float32)) + columns, mask=b_mask, other=0.0)
        before *= factors
        if tl.load(entry + AT_FLAGS) & SCALES_SUM != 0:
            sums *= factors
    sums += before
    if bias != 0:
        weight = tl.load(tile + 3).to(tl.float32, bitcast=True)
        sums += weight * tl.load(bias.to(tl.pointer_type(tl.float32)) + columns, mask=b_mask, other=0.0)
    tl.store(to, sums.to(out.dtype.element_ty), mask=mask)


class TritonSidePath:
    """The side paths of modules on one device."""

    def tiles(self, segments: Sequence[step.Segment]) -> list[step.Segment]:
        """Segments cut up so that none is higher than a tile."""
        return [
            segment._replace(first=row, last=min(row + TILE_ROWS, segment.last))
            for segment in segments
            for row in range(segment.first, segment.last, TILE_ROWS)
        ]

    def add(
        self, x: torch.Tensor, out: torch.Tensor, table: torch.Tensor, tiles: torch.Tensor, max_rank: int
    ) -> None:
        """out [rows, out_features] += the side paths of x [rows, in_features].

        Args:
            x, out: float32, bfloat16 or float16, contiguous.
            table: the module's, int64 [slots, ENTRY]; B is [rank, out_features] there.
            tiles: int32 [n, 5], as `tiles` cuts them; none shares rows with another.
            max_rank: the largest offset and rank together among them.
        """
        (rows, in_features), width = x.shape, out.shape[1]
        h = torch.empty(rows, max_rank, dtype=torch.float32, device=x.device)
        # Triton launches on the current device, which needn't be the tensors'.
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            if max_rank:
                shrink[len(tiles), triton.cdiv(max_rank, TILE_RANK)](
                    h, x, tiles, table, in_features, max_rank, ENTRY, TILE_ROWS, TILE_RANK, TILE_IN
                )
            expand[len(tiles), triton.cdiv(width, TILE_OUT)](
                out, h, tiles, table, width, max_rank, ENTRY, TILE_ROWS, TILE_RANK, TILE_OUT
            )
