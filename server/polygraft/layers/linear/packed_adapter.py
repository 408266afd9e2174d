"""What an adapter has for one module, as the operators read it, and the same operators in torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from polygraft.core.primitives import LowRank
from polygraft.layers.linear.memory import Arena
from polygraft.layers.linear.panels import unpack


class PackedAdapter(NamedTuple):
    """An adapter's tensors for one module; absent ones are None.

    Args:
        a: [rank, in_features], or in panels as `panels.pack` makes them.
        b: B^T in panels, [panels, rank, columns].
        bias: float32 [columns of all panels]; added to every row.
        in_scale: float32 [in_features]; the base's product is of the input times this.
        out_scale: float32 [columns of all panels]; the base's product is multiplied by it.
        w1: float32 [o1, i1]; with the next a Kronecker product that is added as B A is.
        w2: float32 [i2, o2], transposed.
        rotation: float32 [blocks, size, size] or, the same for all, [1, size, size]; the base's product is of
            the input times these on a diagonal.
        scaling: of B A, without the bias.
        scales_sum: whether `out_scale` multiplies B A as well.
    """

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    in_scale: torch.Tensor | None = None
    out_scale: torch.Tensor | None = None
    w1: torch.Tensor | None = None
    w2: torch.Tensor | None = None
    rotation: torch.Tensor | None = None
    scaling: float = 1.0
    scales_sum: bool = False

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Its tensors in their order."""
        return (
            self.a, self.b, self.bias, self.in_scale, self.out_scale, self.w1, self.w2, self.rotation,
        )  # fmt: skip

    @property
    def rank(self) -> int:
        """Columns of B."""
        return 0 if self.b is None else self.b.shape[1]

    @property
    def a_in_panels(self) -> bool:
        """Whether A lies in panels."""
        return self.a is not None and self.a.dim() > 2

    @property
    def rows_of_a(self) -> torch.Tensor:
        """[rank, in_features]; a copy where it lies in panels."""
        assert self.a is not None
        if not self.a_in_panels:
            return self.a
        inputs = self.a[0].numel() // self.a.shape[2]
        return unpack(self.a, (self.rank, inputs))

    @property
    def between(self) -> int:
        """Numbers for each row that a Kronecker product's first half leaves to its second: native/kron.h."""
        if self.w1 is None or self.w2 is None:
            return 0
        (o1, i1), (i2, o2) = self.w1.shape, self.w2.shape
        return int(min(i1 * o2, o1 * i2))

    @property
    def transforms(self) -> bool:
        """Whether the base's product is of another input than the module's own."""
        return self.in_scale is not None or self.rotation is not None

    def transformed(self, x: torch.Tensor) -> torch.Tensor:
        """What the base's product is of, float32 [rows, in_features], for x likewise."""
        if self.in_scale is not None:
            x = x * self.in_scale
        if self.rotation is not None:
            x = _times_blocks(x, self.rotation)
        return x

    def applied(self, x: torch.Tensor, out: torch.Tensor, weight: float) -> torch.Tensor:
        """`out` [rows, out_features] with the adapter applied, float32, for x float32 [rows, in_features].

        Args:
            weight: on what it adds.
        """
        width, out = out.shape[-1], out.float()
        scale = None if self.out_scale is None else self.out_scale[:width]
        if scale is not None and not self.scales_sum:
            out = out * scale
        if self.a is not None and self.b is not None:
            h = weight * self.scaling * (x @ self.rows_of_a.float().t())
            out = out + h @ self._columns_of_b(width)
        if scale is not None and self.scales_sum:
            out = out * scale
        out = out + weight * self.kron_product(x, width)
        return out if self.bias is None else out + weight * self.bias[:width]

    def kron_product(self, x: torch.Tensor, width: int) -> torch.Tensor:
        """The Kronecker product times x, float32 [rows, width], for x float32 [rows, in_features]."""
        if self.w1 is None or self.w2 is None:
            return x.new_zeros(len(x), width)
        return (self.w1 @ x.reshape(len(x), self.w1.shape[1], -1) @ self.w2).flatten(1)

    def folded(self, weight: torch.Tensor) -> torch.Tensor:
        """A module's weight [out_features, in_features] with all of it in, float32."""
        merged = weight.float()
        if self.rotation is not None:
            merged = _times_blocks(merged, self.rotation.transpose(1, 2))
        if self.in_scale is not None:
            merged = merged * self.in_scale
        scale = None if self.out_scale is None else self.out_scale[: len(weight), None]
        if scale is not None and not self.scales_sum:
            merged = merged * scale
        if self.a is not None and self.b is not None:
            merged = merged + self.low_rank(len(weight)).product
        if scale is not None and self.scales_sum:
            merged = merged * scale
        if self.w1 is not None and self.w2 is not None:
            product = self.w1[:, None, :, None] * self.w2.t()[None, :, None, :]
            merged = merged + product.reshape(merged.shape)
        return merged

    def low_rank(self, width: int) -> LowRank:
        """A as it is kept and B [width, rank], in float32."""
        return LowRank(self.rows_of_a, self._columns_of_b(width).t(), scaling=self.scaling)

    def _columns_of_b(self, width: int) -> torch.Tensor:
        """float32 [rank, width]"""
        assert self.b is not None
        return self.b.float().transpose(0, 1).flatten(1)[:, :width]


def _times_blocks(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """x [..., in_features] times a block-diagonal matrix of blocks [n or 1, size, size]."""
    parts = x.reshape(*x.shape[:-1], -1, 1, blocks.shape[-1])
    return (parts @ blocks).reshape(x.shape)


def together(adapter: Sequence[PackedAdapter]) -> list[PackedAdapter]:
    """Copies of an adapter's weights in one piece of memory.

    An adapter has hundreds of small tensors, which would come to lie between those of loads that are over:
    the heap would keep the holes.
    """
    tensors = [tensor for packed in adapter for tensor in packed.tensors if tensor is not None]
    arena = Arena(tensors, tensors[0].device if tensors else None)

    def copy(part: torch.Tensor | None) -> torch.Tensor | None:
        return None if part is None else arena.copy(part)

    return [
        packed._replace(
            a=copy(packed.a),
            b=copy(packed.b),
            bias=copy(packed.bias),
            in_scale=copy(packed.in_scale),
            out_scale=copy(packed.out_scale),
            w1=copy(packed.w1),
            w2=copy(packed.w2),
            rotation=copy(packed.rotation),
        )
        for packed in adapter
    ]
