"""Runs a batch through the base: the only place that calls the model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from polygraft.adapters.stack import Runs
from polygraft.base.loader import Base
from polygraft.base.optimize.fused_model import FusedModel
from polygraft.engine.schedule.scheduler import Batch, Scheduled
from polygraft.layers.adapter_bank import AdapterBank
from polygraft.layers.linear.low_rank_bank import Run
from polygraft.layers.linear.merging import WeightSwitch
from polygraft.layers.step import AttentionPlan, StepContext


class ModelRunner:
    """Packs a batch's rows into one ragged forward without padding.

    Args:
        block_size: tokens in a block of the cache.
        fused_model: gives the same logits as the base's model, faster.
    """

    def __init__(
        self,
        base: Base,
        bank: AdapterBank,
        switch: WeightSwitch,
        step: StepContext,
        block_size: int,
        fused_model: FusedModel | None = None,
    ) -> None:
        self._base = base
        self._device = base.device  # looked up among the model's parameters
        self._fused_model = fused_model
        self._bank = bank
        self._switch = switch
        self.switched = False
        """Whether the last batch ran on other weights than the one before."""
        self._step = step
        self._block_size = block_size
        # A mask of four dimensions is taken for a finished one, so transformers builds none and doesn't
        # look for packed sequences; attention goes by the plan.
        self._no_mask = torch.zeros(1, 1, 1, 1, device=self._device)

    def run(self, batch: Batch) -> torch.Tensor:
        """Run a batch; keys and values of its rows are in the cache afterwards.

        Returns:
            logits [all items' `logit_rows`, tokens], in the batch's order; as many as the row that knows the
            most, -inf for those that a row doesn't know. In float32, whatever the base's type is.
        """
        self.switched = self._switch.use(None if batch.copy is None else batch.copy.weights)
        items = batch.items
        starts = list(itertools.accumulate((item.count for item in items), initial=0))
        head_rows = [
            start + row for start, item in zip(starts, items, strict=False) for row in item.logit_rows
        ]
        device = self._device
        ids, positions = self._rows(items)
        every = wanted = self._bank.segments(
            *_runs([run for item in items for run in item.runs(range(item.count))])
        )
        kept: torch.Tensor | None = None
        if len(head_rows) < len(ids):
            wanted = self._bank.segments(
                *_runs([run for item in items for run in item.runs(item.logit_rows)])
            )
            kept = torch.tensor(head_rows, dtype=torch.long, device=device)
        self._step.begin(self._attention_plan(items, starts), every, wanted, rows=len(ids))
        inputs = {"input_ids": ids[None].to(device)}
        if any(item.sequence.embeddings is not None for item in items):
            inputs = {"inputs_embeds": self._embed(items, starts, ids.to(device))[None]}
        try:
            with torch.inference_mode():
                logits = self._logits(positions[None].to(device), kept, inputs)
                self._bank.replaced.clear_foreign(logits, wanted)
        finally:
            self._step.end()
        return logits

    def _logits(
        self, positions: torch.Tensor, kept: torch.Tensor | None, inputs: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return logits [kept rows, tokens].

        Args:
            positions: int64 [1, rows].
            kept: int64 [n]; None keeps all rows.
            inputs: "input_ids" or "inputs_embeds".
        """
        if self._fused_model is not None:
            fused = self._fused_model(positions, kept, **inputs)
            if fused is not None:
                return fused
        logits: torch.Tensor = self._base.model(
            **inputs,
            position_ids=positions,
            attention_mask=self._no_mask,
            use_cache=False,
            logits_to_keep=0 if kept is None else kept,
        ).logits[0]
        return logits

    def _rows(self, items: list[Scheduled]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and positions of all rows."""
        ids: list[int] = []
        positions: list[int] = []
        for item in items:
            sequence = item.sequence
            end = item.start + item.count
            ids += sequence.token_ids[item.start : end]
            first = sequence.prefix.start if sequence.prefix else 0
            positions += range(first + item.start, first + end)
        return torch.tensor(ids), torch.tensor(positions)

    def _embed(self, items: list[Scheduled], starts: list[int], ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [rows, hidden] with the soft prompts' own in their rows."""
        with torch.inference_mode():
            embedded: torch.Tensor = self._base.model.get_input_embeddings()(ids)
            for item, row in zip(items, starts, strict=False):
                soft = item.sequence.embeddings
                if soft is not None:
                    embedded[row : row + item.count] = soft[item.start : item.start + item.count].to(embedded)
            return embedded

    def _attention_plan(self, items: list[Scheduled], starts: list[int]) -> AttentionPlan:
        size = self._block_size
        tables, contexts, prefixes = [], [], []
        slots: list[int] = []
        for item in items:
            sequence = item.sequence
            prefix = sequence.prefix
            contexts.append(item.start + item.count + (prefix.length if prefix else 0))
            prefixes.append(prefix.length if prefix else 0)
            tables.append(prefix.blocks + sequence.blocks if prefix else sequence.blocks)
            tokens = range(item.start, item.start + item.count)
            slots += [sequence.blocks[token // size] * size + token % size for token in tokens]
        table = np.zeros((len(items), max(map(len, tables))), dtype=np.int32)
        for row, blocks in enumerate(tables):
            table[row, : len(blocks)] = blocks
        device = self._device
        return AttentionPlan(
            slot_mapping=torch.tensor(slots, device=device),
            query_start=torch.tensor(starts, dtype=torch.int32, device=device),
            context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
            prefix_lens=torch.tensor(prefixes, dtype=torch.int32, device=device),
            block_tables=torch.from_numpy(table).to(device),
            bare=self._bare(items),
        )

    def _bare(self, items: list[Scheduled]) -> torch.Tensor | None:
        """Layers that have nothing of each sequence's prefix, as `AttentionPlan` wants them."""
        layers = [item.sequence.prefix.bare if item.sequence.prefix else () for item in items]
        if not any(layers):
            return None
        bare = torch.zeros(len(items), len(self._base.spec.attention), dtype=torch.uint8)
        for row, without in enumerate(layers):
            bare[row, list(without)] = 1
        return bare.to(self._device)


def _runs(items: Sequence[tuple[Runs, int]]) -> list[list[Run]]:
    """The runs of neighbouring rows whose first adapters are equal, of those whose first two are, and so on.

    Args:
        items: side paths and the number of rows that have them.
    """
    depths: list[list[Run]] = []
    for depth in range(max((len(paths) for paths, _ in items), default=0)):
        runs: list[Run] = []
        first = 0
        for paths, group in itertools.groupby(items, key=lambda item: item[0][: depth + 1]):
            last = first + sum(count for _, count in group)
            if len(paths) > depth and last > first:
                runs.append((first, last, *paths[depth]))
            first = last
        depths.append(runs)
    return depths
