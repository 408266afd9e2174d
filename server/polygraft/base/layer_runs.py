"""Finds the decoder layers that are computed together, in one call.

A layer can be computed with the one before it if the model calls it right afterwards, with what that one has
given, untouched, and with the same positions. Which ones those are is seen by watching the model's own code
run a few rows, and whether they give the same together as one by one is tried on the whole model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from polygraft.layers.decoder_layer import FusedDecoderLayer
from polygraft.layers.step import NO_SEGMENTS, AttentionPlan, BrokenRun, StepContext

_TRIAL_ROWS = 5


@contextmanager
def trial_step(step: StepContext, key_cache: torch.Tensor) -> Iterator[int]:
    """A step of one sequence in the cache's first blocks; gives its number of rows.

    Args:
        key_cache: of any layer, [blocks, kv_heads, head_dim, block_size].
    """
    blocks, size = key_cache.shape[0], key_cache.shape[3]
    rows = min(_TRIAL_ROWS, blocks * size)
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
) -> None:
    """Have every first of several neighbours compute them all, unless the model then gives something else.

    Args:
        fused: by the module whose forward it is.
    """
    step.joins = False
    if len(fused) < 2:
        return
    try:
        calls, logits = _watch(model, fused, step)
        runs = _runs(calls)
        for first, *others in runs:
            # A hook behind a layer but the last, or before one but the first, comes between two of them.
            hooks = [call.module._forward_hooks for call in (first, *others[:-1])]
            hooks += [call.module._forward_pre_hooks for call in others]
            fused[first.module].join([fused[call.module] for call in others], hooks)
        step.joins = True
        step.joins = bool(runs) and torch.equal(_logits(model, fused, step), logits)
    except (BrokenRun, RuntimeError, TypeError, ValueError):
        step.joins = False


class _Call(NamedTuple):
    """One call of a fused layer by the model."""

    module: nn.Module
    layer: FusedDecoderLayer
    x: object
    positions: object
    out: object


def _watch(
    model: PreTrainedModel, fused: Mapping[nn.Module, FusedDecoderLayer], step: StepContext
) -> tuple[list[_Call], torch.Tensor]:
    """How the model calls its layers, in its order, and its logits."""
    calls: list[_Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        x = args[0] if len(args) == 1 else None
        calls.append(_Call(module, fused[module], x, kwargs.get("position_embeddings"), out))

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in fused]
    try:
        return calls, _logits(model, fused, step)
    finally:
        for hook in hooks:
            hook.remove()


def _logits(
    model: PreTrainedModel, fused: Mapping[nn.Module, FusedDecoderLayer], step: StepContext
) -> torch.Tensor:
    """Logits [rows, vocabulary] of a few rows, called as `model_runner` does."""
    cache = next(iter(fused.values())).attention.key_cache
    with trial_step(step, cache) as rows:
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.config.get_text_config().vocab_size
        logits: torch.Tensor = model(
            input_ids=torch.randint(vocabulary, (1, rows), generator=generator),
            position_ids=torch.arange(rows)[None],
            attention_mask=torch.zeros(1, 1, 1, 1),
            use_cache=False,
        ).logits[0]
    if step.following is not None:
        raise BrokenRun
    return logits


def _runs(calls: list[_Call]) -> list[list[_Call]]:
    """Two and more calls in a row of layers that can be computed together."""
    if len({call.module for call in calls}) < len(calls):  # one is called several times, each with other rows
        return []
    runs: list[list[_Call]] = [[call] for call in calls[:1]]
    for before, call in itertools.pairwise(calls):
        if (
            call.x is before.out
            and call.positions is not None
            and call.positions is before.positions
            and call.layer.shape == before.layer.shape
        ):
            runs[-1].append(call)
        else:
            runs.append([call])
    return [run for run in runs if len(run) > 1]
