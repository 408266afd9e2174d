"""Whole decoder layers as one C++ operator, instead of a dozen calls for each.

A single layer's operator replaces its `forward`; `FusedLayers` computes all layers of a model in one call.
`base/optimize/layer_fusing.py` decides which layers are fused, and checks the results.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch

from polygraft.layers.attention import PagedAttention
from polygraft.layers.fused import FusedRmsNorm
from polygraft.layers.linear.linear import LinearGroup
from polygraft.layers.native.kernels import DTYPES, Kernels
from polygraft.layers.native.structures import DecoderLayerStruct, NormStruct
from polygraft.layers.replaced.norms import AdaptedNorm
from polygraft.layers.residual.bottlenecks import BottleneckSite
from polygraft.layers.step import StepContext

_NORMS = ("before_attention", "after_attention", "before_mlp", "after_mlp", "q", "k")


class FusedDecoderLayer:
    """A decoder layer's `forward` in one call.

    Args:
        original: the layer's own forward, which computes what the operator doesn't take.
        norms: before and after the attention, before and after the feed-forward, over queries, over keys;
            wrapped where adapters can replace them.
        groups: q k v; o; gate up; down.
        sites: of bottleneck adapters, where the attention and the feed-forward are added; or none.
    """

    def __init__(
        self,
        original: Callable[..., object],
        attention: PagedAttention,
        norms: Sequence[AdaptedNorm | FusedRmsNorm | None],
        groups: Sequence[LinearGroup],
        sites: Sequence[BottleneckSite],
        activation: int,
        step: StepContext,
        kernels: Kernels,
    ) -> None:
        self._original = original
        self.attention = attention
        self.hidden_size = groups[0].in_features
        self.head_dim = attention.site.head_dim
        self.dtype = groups[0].dtype
        own_norms = sum(1 << norm.index for norm in norms if isinstance(norm, AdaptedNorm))
        self.bits = [*(group.bits for group in groups), own_norms, *(1 << site.index for site in sites)]
        """For each thing that adapters can change, in the order of decoder_layer.h's `Adapted`: the bits of
        `Segments.touched` that tell of it."""
        self._held = norms, groups, sites  # the structure points into them
        self._struct = DecoderLayerStruct(
            attention.address,
            *(group.address for group in groups),
            *(NormStruct() if n is None else NormStruct(n.scale.data_ptr(), n.eps) for n in norms),
            self.hidden_size,
            activation,
            *(site.address for site in sites),
        )
        for norm, name in zip(norms, _NORMS, strict=True):
            if isinstance(norm, AdaptedNorm):
                norm.bind(getattr(self._struct, name))
        self.address = ctypes.addressof(self._struct)
        self.buffer_width = kernels.decoder_layer_buffer(self.address)
        self._alone = FusedLayers([self], step, kernels)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        *args: object,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: object,
    ) -> object:
        """[1, rows, hidden] to the same, with rotary positions (cos, sin), each [1, rows, head_dim]."""
        if not args and position_embeddings is not None:
            out = self._alone(hidden_states, position_embeddings)
            if out is not None:
                return out
        return self._original(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)


class FusedLayers:
    """Successive decoder layers in one call: all of a model's, or a single one.

    Args:
        layers: with the same hidden size, head dimension and type.
    """

    def __init__(self, layers: Sequence[FusedDecoderLayer], step: StepContext, kernels: Kernels) -> None:
        self._head_dim, self._dtype = layers[0].head_dim, layers[0].dtype
        self._addresses = (ctypes.c_void_p * len(layers))(*(layer.address for layer in layers))
        self._bits = [layer.bits for layer in layers]
        self._width = max(layer.buffer_width for layer in layers)
        self._adapted = (ctypes.c_int64 * len(layers))()
        self._touched = 0  # the step's `Segments.touched` that `_adapted` was filled for
        self._step = step
        self._kernels = kernels

    def __call__(self, x: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor | None:
        """Compute the layers, one after another.

        Args:
            x: [1, rows, hidden], the first layer's input.
            positions: (cos, sin), each [1, rows, head_dim].

        Returns:
            The last layer's output [1, rows, hidden]; None if no step runs, or if the operator doesn't take
            tensors of these types and shapes.
        """
        step = self._step
        if step.attention is None or x.dtype is not self._dtype:
            return None
        # Single layers that share their positions share the rest of the step's description too.
        if step.positions is not positions or step.head_dim != self._head_dim:
            if not all(self._serves(x, table) for table in positions):
                return None
            step.describe_rows(positions)
        if step.segments.touched != self._touched:
            self._note_adapted(step.segments.touched)
        step.rows.buffer = step.buffer(x.shape[1] * self._width, self._dtype).data_ptr()
        x = x.contiguous()
        out = torch.empty_like(x)
        self._kernels.decoder_layers(
            DTYPES[self._dtype], self._addresses, self._adapted, len(self._addresses), step.rows_address,
            x.data_ptr(), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def _note_adapted(self, touched: int) -> None:
        """Fill in what the step's adapters change in each layer; most steps change the same as the last."""
        self._touched = touched
        for at, layer_bits in enumerate(self._bits):
            self._adapted[at] = sum(1 << bit for bit, bits in enumerate(layer_bits) if touched & bits)

    def _serves(self, x: torch.Tensor, positions: torch.Tensor) -> bool:
        """Whether the operator can read these positions: it doesn't check their shape."""
        wanted = (1, x.shape[1], self._head_dim)
        return positions.shape == wanted and positions.dtype is x.dtype and positions.is_contiguous()
