"""Finds the decoder layers that are computed together, in one call.

A layer can be computed with the one before it if the model calls it right afterwards, with what that one has
given, untouched, and with the same positions. Which ones those are is seen by watching the model's own code
run a few rows, and whether they give the same together as one by one is tried on the whole model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from polygraft.base.optimize.model_frame import Call, ModelFrame, find_frame, watch_calls
from polygraft.layers.decoder_layer import FusedDecoderLayer
from polygraft.layers.step import NO_SEGMENTS, AttentionPlan, BrokenRun, StepContext

_TRIAL_ROWS = 5


def trial_rows(key_cache: torch.Tensor) -> int:
    """How many rows are tried."""
    return min(_TRIAL_ROWS, key_cache.shape[0] * key_cache.shape[3])


@contextmanager
def trial_step(step: StepContext, key_cache: torch.Tensor) -> Iterator[int]:
    """A step of one sequence in the cache's first blocks; gives its number of rows.

    Args:
        key_cache: of any layer, [blocks, kv_heads, head_dim, block_size].
    """
    rows, size = trial_rows(key_cache), key_cache.shape[3]
    plan = AttentionPlan(
        slot_mapping=torch.arange(rows),
        query_start=torch.tensor([0, rows], dtype=torch.int32),
        context_lens=torch.tensor([rows], dtype=torch.int32),
        prefix_lens=torch.tensor([0], dtype=torch.int32),
        block_tables=torch.arange(-(-rows // size), dtype=torch.int32)[None],
    )
    step.begin(plan, NO_SEGMENTS, NO_SEGMENTS, rows)
    try:
        with torch.inference_mode():
            yield rows
    finally:
        step.end()


def join_neighbours(
    model: PreTrainedModel, fused: Mapping[nn.Module, FusedDecoderLayer], step: StepContext
) -> ModelFrame | None:
    """Have every first of several neighbours compute them all, unless the model then gives something else.

    Args:
        fused: by the module whose forward it is.

    Returns:
        What is around them, if they are all of the model's layers and the rest can be called without it.
    """
    step.joins = False
    if len(fused) < 2:
        return None
    trial = _Trial(model, next(iter(fused.values())).attention.key_cache, step)
    try:
        with watch_calls(model) as calls:
            one_by_one = trial.run(model)
        of_layers = [call for call in calls if call.module in fused]
        runs = _runs(of_layers, fused)
        for run in runs:
            fused[run[0].module].join({call.module: fused[call.module] for call in run})
        step.joins = True
        if not runs or not torch.equal(trial.run(model), one_by_one):
            step.joins = False
            return None
        if runs != [of_layers]:
            return None
        first = fused[of_layers[0].module]
        frame = find_frame(model, calls, of_layers, first, trial.positions, step)
        return frame if frame and torch.equal(trial.run(frame), one_by_one) else None
    except (BrokenRun, RuntimeError, TypeError, ValueError):
        step.joins = False
        return None


class _Trial:
    """Runs a few rows through a model, called as `model_runner` does.

    Args:
        key_cache: of any of its layers.
    """

    def __init__(self, model: PreTrainedModel, key_cache: torch.Tensor, step: StepContext) -> None:
        self._cache = key_cache
        self._step = step
        rows = trial_rows(key_cache)
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.config.get_text_config().vocab_size
        self._ids = torch.randint(vocabulary, (1, rows), generator=generator)
        self.positions = torch.arange(rows)[None]

    def run(self, model: PreTrainedModel | ModelFrame) -> torch.Tensor:
        """Logits of all rows but the first, [rows - 1, vocabulary]."""
        with trial_step(self._step, self._cache) as rows:
            kept = torch.arange(1, rows)
            if isinstance(model, ModelFrame):
                logits = model(self.positions, kept, input_ids=self._ids)
            else:
                logits = model(
                    input_ids=self._ids,
                    position_ids=self.positions,
                    attention_mask=torch.zeros(1, 1, 1, 1),
                    use_cache=False,
                    logits_to_keep=kept,
                ).logits[0]
            if logits is None or self._step.following is not None:
                raise BrokenRun
            return logits


def _runs(calls: list[Call], fused: Mapping[nn.Module, FusedDecoderLayer]) -> list[list[Call]]:
    """Two and more calls in a row of layers that can be computed together."""
    if len({call.module for call in calls}) < len(calls):  # one is called several times, each with other rows
        return []
    runs = [[call] for call in calls[:1]]
    for before, call in itertools.pairwise(calls):
        if (
            len(call.args) == len(before.args) == 1
            and call.args[0] is before.out
            and call.positions is not None
            and call.positions is before.positions
            and fused[call.module].shape == fused[before.module].shape
        ):
            runs[-1].append(call)
        else:
            runs.append([call])
    return [run for run in runs if len(run) > 1]
