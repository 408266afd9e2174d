"""Changes the logits of the rows that ask for it: biases and penalties, before the temperature."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Rows

import torch

from polygraft_types.requests import SamplingParams

_LARGEST = 1e30
"""Limit of what a repetition penalty may raise a logit to, so that it stays finite. Penalties small enough to
reach it are refused earlier, since it makes different tokens equally likely."""


def adjust(
    logits: torch.Tensor, params: Rows[SamplingParams], tokens: Rows[list[int]], prompt_tokens: Rows[int]
) -> torch.Tensor:
    """Apply each row's own bias and penalties; a row's result depends on nothing but that row.

    Args:
        logits: [rows, vocabulary]; may be changed in place.
        params: one for each row.
        tokens: each row's prompt and what has been generated.
        prompt_tokens: how many of them are the prompt's.

    Returns:
        The logits; in float32 if any row asked, since 16 bits would round small penalties away.
    """
    asking = [row for row, p in enumerate(params) if p.adjusts]
    if not asking:
        return logits
    logits = logits.float()
    for row in asking:
        _adjust_row(logits[row], params[row], tokens[row], prompt_tokens[row])
    return logits


def _adjust_row(row: torch.Tensor, params: SamplingParams, tokens: list[int], prompt_tokens: int) -> None:
    if params.logit_bias:
        ids, biases = zip(*params.logit_bias, strict=True)
        row[list(ids)] += torch.tensor(biases, dtype=row.dtype, device=row.device)
    if params.repetition_penalty != 1.0:
        # Tokens that come twice are written twice with the same value.
        seen = torch.tensor(tokens, device=row.device)
        there = row[seen].double()
        penalty = params.repetition_penalty
        changed = torch.where(there < 0, there * penalty, (there / penalty).clamp(max=_LARGEST))
        row[seen] = changed.to(row.dtype)
    generated = tokens[prompt_tokens:]
    if generated and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(generated)
        often = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
        row[list(counts)] -= params.presence_penalty + params.frequency_penalty * often
