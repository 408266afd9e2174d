"""Modules of the base that adapters can replace for their own rows: norms, and rows of embedding and head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from polygraft.core.adapter_weights import AdapterWeights
from polygraft.layers.native.kernels import Kernels
from polygraft.layers.replaced.norms import AdaptedNorm
from polygraft.layers.replaced.token_rows import AdaptedEmbedding, AdaptedHead, OwnRows
from polygraft.layers.step import Segments, StepContext

if TYPE_CHECKING:
    from polygraft.core.spec import BaseSpec


class ReplacedModules:
    """Wraps them in place; linear modules must have been wrapped before.

    Args:
        first_bit: the first in `Segments.touched` that is free.
    """

    def __init__(
        self, model: nn.Module, base: BaseSpec, step: StepContext, kernels: Kernels | None, first_bit: int
    ) -> None:
        self.base = base
        self._kernels = kernels
        self._embedding: AdaptedEmbedding | None = None
        self._head: AdaptedHead | None = None
        self._norms: dict[str, AdaptedNorm] = {}
        self._vocabularies: dict[int, int] = {}
        if base.embedding is not None:
            table = model.get_submodule(base.embedding.name)
            assert isinstance(table, nn.Embedding)
            self._embedding = AdaptedEmbedding(table, first_bit, step)
            model.set_submodule(base.embedding.name, self._embedding)
        if base.head is not None and base.head in base.token_modules:
            head = model.get_submodule(base.head)
            self._head = AdaptedHead(head, first_bit + 1, base.vocabulary_size, step)
            model.set_submodule(base.head, self._head)
        for index, (name, shape) in enumerate(base.norms.items(), first_bit + 2):
            self._norms[name] = AdaptedNorm(model.get_submodule(name), index, shape.axis, step)
            model.set_submodule(name, self._norms[name])

    def install(self, slot: int, compiled: AdapterWeights) -> int:
        """Put an adapter's weights, resolved, into a slot; returns the bits of the modules that have any."""
        touched = 0
        for name, weights in compiled.each("norm").items():
            self._norms[name].install(slot, weights)
            touched |= 1 << self._norms[name].index
        own: dict[str, OwnRows] = {}
        for rows in compiled.token_rows:
            assert self._embedding is not None
            table: torch.Tensor = self._embedding.weight
            multiplies = self.base.head in rows.modules
            kept = OwnRows(rows, table.dtype, table.device, multiplies=multiplies, kernels=self._kernels)
            own.update(dict.fromkeys(rows.modules, kept))
        embedding = None if self.base.embedding is None else own.get(self.base.embedding.name)
        if embedding is not None or compiled.embedding is not None:
            assert self._embedding is not None
            self._embedding.install(slot, embedding, compiled.embedding)
            touched |= 1 << self._embedding.index
        head = own.get(self.base.head or "")
        if head is not None:
            assert self._head is not None
            self._head.install(slot, head, compiled.vocabulary or self.base.vocabulary_size)
            touched |= 1 << self._head.index
        if compiled.vocabulary is not None:
            self._vocabularies[slot] = compiled.vocabulary
        return touched

    def remove(self, slot: int) -> None:
        """Empty a slot; no step that uses it may be running."""
        if self._embedding is not None:
            self._embedding.remove(slot)
        if self._head is not None:
            self._head.remove(slot)
        for norm in self._norms.values():
            norm.remove(slot)
        self._vocabularies.pop(slot, None)

    def clear_foreign(self, logits: torch.Tensor, segments: Segments) -> None:
        """Make tokens impossible that a row doesn't know.

        Args:
            logits: [rows, tokens], changed in place.
            segments: of these rows.
        """
        if not self._vocabularies:
            return
        known, rows = self.base.vocabulary_size, len(logits)
        # Nothing acts beside an adapter with rows of its own, so these are in order and share none.
        own = [
            (s.first, s.last, self._vocabularies[s.slot])
            for s in segments.host
            if s.slot in self._vocabularies
        ]
        row = 0
        for first, last, tokens in (*own, (rows, rows, known)):
            logits[row:first, known:] = -torch.inf
            logits[first:last, tokens:] = -torch.inf
            row = last

    @property
    def table(self) -> AdaptedEmbedding | None:
        """The embedding, if adapters can have rows of it."""
        return self._embedding
