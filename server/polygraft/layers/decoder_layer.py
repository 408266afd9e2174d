"""Whole decoder layers as one C++ operator, in the place of a dozen calls each.

`base/layer_fusing.py` decides where, and checks the results.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch

from polygraft.layers.attention import PagedAttention
from polygraft.layers.fused import FusedRmsNorm
from polygraft.layers.linear import LinearGroup
from polygraft.layers.native.kernels import DTYPES, Kernels
from polygraft.layers.native.structures import DecoderLayerStruct, NormStruct, RowsStruct
from polygraft.layers.step import StepContext


class FusedDecoderLayer:
    """A decoder layer's `forward` in one call.

    Args:
        original: the layer's own forward, for rows of another type.
        norms: before and after the attention, before and after the feed-forward, over queries, over keys.
        groups: q k v; o; gate up; down.
    """

    def __init__(
        self,
        original: Callable[..., object],
        attention: PagedAttention,
        norms: Sequence[FusedRmsNorm | None],
        groups: Sequence[LinearGroup],
        activation: int,
        step: StepContext,
        kernels: Kernels,
    ) -> None:
        self._original = original
        self.attention = attention
        self.hidden_size = groups[0].in_features
        self._norms = norms  # the structure points into them
        self._groups = groups
        self._dtype = groups[0].dtype
        self._step = step
        self._kernels = kernels
        self._struct = DecoderLayerStruct(
            attention.address,
            *(group.address for group in groups),
            *(NormStruct(None, 0.0) if n is None else NormStruct(n.scale.data_ptr(), n.eps) for n in norms),
            self.hidden_size,
            activation,
        )
        self._rows = RowsStruct()
        self._width = kernels.decoder_layer_buffer(ctypes.addressof(self._struct))

    def __call__(
        self,
        hidden_states: torch.Tensor,
        *args: object,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: object,
    ) -> object:
        """[1, rows, hidden] to the same, with rotary positions (cos, sin), each [1, rows, head_dim]."""
        x, plan = hidden_states, self._step.attention
        if args or plan is None or x.dtype is not self._dtype or not self._serves(x, position_embeddings):
            return self._original(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        assert position_embeddings is not None
        cos, sin = (t.contiguous() for t in position_embeddings)
        segments = self._step.segments
        adapted = 0
        if segments.touched:
            for bit, group in enumerate(self._groups):
                adapted |= bool(segments.touched & group.bits) << bit
        buffer = self._step.buffer(x.shape[1] * self._width, self._dtype)
        rows = self._rows
        rows.cos, rows.sin = cos.data_ptr(), sin.data_ptr()
        rows.plan = ctypes.addressof(plan.native())
        rows.segments, rows.num_segments = segments.table.data_ptr(), len(segments.host)
        rows.scratch, rows.max_rank = self._step.scratch.data_ptr(), segments.max_rank
        rows.buffer = buffer.data_ptr()
        x = x.contiguous()
        out = torch.empty_like(x)
        self._kernels.decoder_layer(
            DTYPES[self._dtype], ctypes.addressof(self._struct), ctypes.addressof(rows), adapted,
            x.data_ptr(), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def _serves(self, x: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor] | None) -> bool:
        """Whether positions are as the operator reads them: it takes widths on trust."""
        wanted = (1, x.shape[1], self.attention.site.head_dim)
        return positions is not None and all(t.shape == wanted and t.dtype is x.dtype for t in positions)
