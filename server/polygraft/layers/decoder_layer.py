"""Whole decoder layers as one C++ operator, in the place of a dozen calls each.

Neighbours are one call together: the first computes them all, and the others hand back what they are given.
`base/optimize/layer_fusing.py` decides where, and checks the results.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from polygraft.layers.attention import PagedAttention
from polygraft.layers.fused import FusedRmsNorm
from polygraft.layers.linear.linear import LinearGroup
from polygraft.layers.native.kernels import DTYPES, Kernels
from polygraft.layers.native.structures import DecoderLayerStruct, NormStruct
from polygraft.layers.replaced.norms import AdaptedNorm
from polygraft.layers.residual.bottlenecks import BottleneckSite
from polygraft.layers.step import BrokenRun, StepContext

_NORMS = ("before_attention", "after_attention", "before_mlp", "after_mlp", "q", "k")


class FusedDecoderLayer:
    """A decoder layer's `forward` in one call.

    Args:
        original: the layer's own forward, for rows of another type.
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
        self._head_dim = attention.site.head_dim
        self._norms = norms  # the structure points into them
        # Of all that adapters can have weights for, in the order of decoder_layer.h's `Adapted`.
        own_norms = sum(1 << norm.index for norm in norms if isinstance(norm, AdaptedNorm))
        self._bits = [*(group.bits for group in groups), own_norms, *(1 << site.index for site in sites)]
        self._groups, self._sites = groups, sites
        self._dtype = groups[0].dtype
        self._step = step
        self._kernels = kernels
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
        self._address = ctypes.addressof(self._struct)
        self._own_width = kernels.decoder_layer_buffer(self._address)
        self._following: FusedDecoderLayer | None = None  # among those that are computed together
        self.join({})

    @property
    def shape(self) -> tuple[int, int, torch.dtype]:
        """What layers that are computed together must have in common: widths and type of what they read."""
        return self.hidden_size, self._head_dim, self._dtype

    def join(self, run: Mapping[nn.Module, FusedDecoderLayer]) -> None:
        """Compute the layers that come behind this one with it.

        Args:
            run: this layer and those, by their modules, in their order and of one `shape`. In every step each
                is called with what the one before has given, with the same positions, and with nothing in
                between; else `BrokenRun` is raised.
        """
        layers = list(run.values()) or [self]
        for layer, following in itertools.pairwise(layers):
            layer._following = following
        # Whoever has a hook there expects to be called between two layers, or behind the last one.
        self._hooks = [module._forward_hooks for module in run]
        self._hooks += [module._forward_pre_hooks for module in list(run)[1:]]
        self._places = [(vars(module), layer) for module, layer in run.items()]
        self._addresses = (ctypes.c_void_p * len(layers))(*(layer._address for layer in layers))
        self._run_bits = [layer._bits for layer in layers]
        self._width = max(layer._own_width for layer in layers)
        self._adapted = (ctypes.c_int64 * len(layers))()
        self._touched = 0  # for which `_adapted` is filled

    @property
    def together(self) -> bool:
        """Whether it computes others as well: as long as nobody has come between them."""
        return (
            self._step.joins
            and len(self._addresses) > 1
            and not any(self._hooks)
            and all(attributes.get("forward") is layer for attributes, layer in self._places)
        )

    def __call__(
        self,
        hidden_states: torch.Tensor,
        *args: object,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: object,
    ) -> object:
        """[1, rows, hidden] to the same, with rotary positions (cos, sin), each [1, rows, head_dim].

        Raises:
            BrokenRun: layers were computed together, and now another one than the next of them is called, or
                with something else than they have given.
        """
        x, step = hidden_states, self._step
        if step.following is not None:
            expected = step.following is self and x is step.stream and position_embeddings is step.positions
            if not expected or args:
                raise BrokenRun
            step.following = self._following
            return x
        if args or step.attention is None or x.dtype is not self._dtype or position_embeddings is None:
            return self._original(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        # Layers that share their positions share what else they are told of the step.
        if step.positions is not position_embeddings or step.head_dim != self._head_dim:
            if not all(self._serves(x, positions) for positions in position_embeddings):
                return self._original(hidden_states, position_embeddings=position_embeddings, **kwargs)
            step.describe_rows(position_embeddings)
        count = len(self._addresses) if self.together else 1
        if step.segments.touched != self._touched:
            self._note_adapted(step.segments.touched)
        step.rows.buffer = step.buffer(x.shape[1] * self._width, self._dtype).data_ptr()
        x = x.contiguous()
        out = torch.empty_like(x)
        self._kernels.decoder_layers(
            DTYPES[self._dtype], self._addresses, self._adapted, count, step.rows_address, x.data_ptr(),
            out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if count > 1:
            step.stream, step.following = out, self._following
        return out

    def _note_adapted(self, touched: int) -> None:
        """Fill in what a step's adapters have weights for; mostly it is the same in step after step."""
        self._touched = touched
        for at, layer_bits in enumerate(self._run_bits):
            self._adapted[at] = sum(1 << bit for bit, bits in enumerate(layer_bits) if touched & bits)

    def _serves(self, x: torch.Tensor, positions: torch.Tensor) -> bool:
        """Whether positions are as the operator reads them: it takes their shape on trust."""
        wanted = (1, x.shape[1], self._head_dim)
        return positions.shape == wanted and positions.dtype is x.dtype and positions.is_contiguous()
