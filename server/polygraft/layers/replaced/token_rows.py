"""The base's embedding and head, for which adapters can have rows of their own.

A step's other rows pay nothing, and steps without such an adapter one test of a bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from polygraft.core.primitives import LowRank, TokenRows
from polygraft.layers.linear.linear import LinearGroup
from polygraft.layers.linear.wide_head import wide_product
from polygraft.layers.native.kernels import DTYPES, Kernels
from polygraft.layers.step import StepContext


class OwnRows:
    """One adapter's rows, once for the embedding and the head if both have the same.

    Args:
        dtype: the base's own rows'.
        device: where those are.
        multiplies: whether logits are computed by them.
        kernels: the operator in C++, or None.
    """

    def __init__(
        self,
        rows: TokenRows,
        dtype: torch.dtype,
        device: torch.device,
        *,
        multiplies: bool,
        kernels: Kernels | None,
    ) -> None:
        self.ids = None if rows.ids is None else rows.ids.to(device)
        weight = rows.weight.to(device, dtype)
        self.count = len(weight)
        self._group: LinearGroup | None = None
        self._weight: torch.Tensor | None = None
        if multiplies and kernels is not None and dtype in DTYPES:
            self._group = LinearGroup([weight], [None], kernels, wide=True)
        else:
            self._weight = weight.clone()

    def find(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of some tokens [n] have rows here, bool [n], and where, int64 [those]."""
        if self.ids is None:
            there = tokens < self.count
            return there, tokens[there]
        at = torch.searchsorted(self.ids, tokens).clamp_(max=self.count - 1)
        there = self.ids[at] == tokens
        return there, at[there]

    def rows(self, at: torch.Tensor) -> torch.Tensor:
        """Some of the rows, [n, hidden_size]."""
        if self._group is not None:
            return self._group.gather(at)
        assert self._weight is not None
        return self._weight[at]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden_size] by every row, float32 [..., rows]."""
        if self._group is not None:
            return self._group.output(0, x)
        assert self._weight is not None
        return wide_product(x, self._weight)


class AdaptedEmbedding(nn.Module):
    """The input embedding, with the step's adapters' rows and low-rank weights.

    Low-rank weights add `B A[:, token]` to a token's row (peft/tuners/lora/layer.py, Embedding.forward).
    What an embedding multiplies its rows by, such as Gemma's, applies to either.

    Args:
        base_layer: untouched.
        index: its bit in `Segments.touched`.
    """

    def __init__(self, base_layer: nn.Embedding, index: int, step: StepContext) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.index = index
        self._step = step
        self._rows = base_layer.num_embeddings
        scale = getattr(base_layer, "embed_scale", None)
        self._scale = None if scale is None else torch.as_tensor(scale, device=base_layer.weight.device)
        self._own: dict[int, OwnRows] = {}
        self._low_rank: dict[int, LowRank] = {}

    def is_understood(self) -> bool:
        """Whether the embedding gives rows of its table, times its scale if it has one, and nothing else."""
        tokens = torch.arange(min(self._rows, 7), device=self.base_layer.weight.device)
        with torch.inference_mode():
            return torch.equal(self.base_layer(tokens), self._scaled(self.base_layer.weight[tokens]))

    def install(self, slot: int, own: OwnRows | None, low_rank: LowRank | None) -> None:
        """Put an adapter's rows and weights into a slot."""
        if own is not None:
            self._own[slot] = own
        if low_rank is not None:
            device = self.base_layer.weight.device
            # Transposed copies, so that each token's numbers are contiguous.
            a, b = low_rank.a.t().to(device).clone().t(), low_rank.b.t().to(device).clone().t()
            self._low_rank[slot] = replace(low_rank, a=a, b=b)

    def low_rank(self, slot: int) -> LowRank:
        """An adapter's weights, not copied."""
        return self._low_rank[slot]

    def remove(self, slot: int) -> None:
        """Empty a slot; no step that uses it may be running."""
        self._own.pop(slot, None)
        self._low_rank.pop(slot, None)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [..., rows] to [..., rows, hidden_size]."""
        segments = self._step.segments
        if not segments.touched >> self.index & 1:
            return self._base(tokens)
        flat = tokens.reshape(-1)
        known = flat.clamp(max=self._rows - 1)
        out = self._base(known)
        for first, last, slot, weight, _ in segments.host:
            mine = out[first:last]
            low_rank = self._low_rank.get(slot)
            if low_rank is not None:
                h = low_rank.a.t()[known[first:last]].float() * (weight * low_rank.scaling)
                mine.copy_(mine.float() + self._scaled(h @ low_rank.b.t().float()))
            own = self._own.get(slot)
            if own is not None:
                there, at = own.find(flat[first:last])
                mine[there] = self._scaled(own.rows(at))
        return out.view(*tokens.shape, -1)

    def _base(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base_layer(tokens)
        return out

    def _scaled(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self._scale is None else rows * self._scale.to(rows.dtype)

    def __getattr__(self, name: str) -> Any:
        """The base layer's own attributes, for model code that reads `module.weight` and the like."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


class AdaptedHead(nn.Module):
    """The output head, with rows of the step's adapters; beneath it lies the one with low-rank weights.

    Where an adapter knows more tokens than the base, all rows get as many logits as it has; those that don't
    belong to a row are for the caller to take away.

    Args:
        index: its bit in `Segments.touched`.
        width: tokens that the base knows.
    """

    def __init__(self, base_layer: nn.Module, index: int, width: int, step: StepContext) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.index = index
        self._width = width
        self._step = step
        self._own: dict[int, tuple[OwnRows, int]] = {}

    def install(self, slot: int, own: OwnRows, vocabulary: int) -> None:
        """Put an adapter's rows into a slot.

        Args:
            vocabulary: tokens that it knows.
        """
        self._own[slot] = (own, vocabulary)

    def remove(self, slot: int) -> None:
        """Empty a slot; no step that uses it may be running."""
        self._own.pop(slot, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1, rows, hidden_size] to float32 [1, rows, tokens], as many as the row with most of them has."""
        segments = self._step.head_segments
        if not segments.touched >> self.index & 1:
            out: torch.Tensor = self.base_layer(x)
            return out
        found = [(s.first, s.last, self._own[s.slot]) for s in segments.host if s.slot in self._own]
        width = max(self._width, *(vocabulary for _, _, (_, vocabulary) in found))
        whole = sum(last - first for first, last, (own, _) in found if own.ids is None)
        logits = torch.zeros(*x.shape[:-1], width, dtype=torch.float32, device=x.device)
        if whole < x.shape[-2]:
            logits[..., : self._width] = self.base_layer(x)
        for first, last, (own, _) in found:
            product = own.product(x[..., first:last, :])
            mine = logits[..., first:last, :]
            if own.ids is None:
                mine[..., : own.count] = product
            else:
                mine.index_copy_(-1, own.ids, product)
        return logits

    def __getattr__(self, name: str) -> Any:
        """The base layer's own attributes, for model code that reads `module.weight` and the like."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)
