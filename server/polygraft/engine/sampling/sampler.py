"""Picks the next token of every sequence in a step, each by its own parameters."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from polygraft.layers.native.kernels import DTYPES
from polygraft.layers.operators import operators_for
from polygraft_types.requests import SamplingParams

_CANDIDATES = 1024
"""So many of the likeliest tokens nearly always settle top_k and top_p; the rest is rarely sorted."""
_MASK = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """The noise of one draw: in [0, 1), a function of its arguments alone.

    SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), keyed by the
    seed and counted by the position, so a request's draws depend neither on the batch nor on preemption.
    """
    z = (_mix(seed & _MASK) + 0x9E3779B97F4A7C15 * (position + 1)) & _MASK
    return (_mix(z) >> 11) / float(1 << 53)


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def sample(logits: torch.Tensor, params: Rows[SamplingParams], positions: Rows[int]) -> list[int | None]:
    """Pick one token for each row.

    Args:
        logits: [rows, vocabulary], of any floating-point type.
        params: one for each row.
        positions: number of tokens before the one that is picked, for the noise.

    Returns:
        Token ids; None for a row whose logits hold NaN or +infinity, or nothing that can be picked.
    """
    tokens: list[int | None] = _likeliest(logits)
    drawn = [row for row, p in enumerate(params) if not p.greedy and tokens[row] is not None]
    if drawn:
        noise = torch.tensor(
            [uniform(params[row].seed, positions[row]) for row in drawn], dtype=torch.float64
        )
        largest = torch.tensor([tokens[row] for row in drawn], device=logits.device)
        picked = _draw(
            logits[drawn].float(), largest, [params[row] for row in drawn], noise.to(logits.device)
        )
        for row, token in zip(drawn, picked, strict=True):
            tokens[row] = token
    return tokens


def _likeliest(logits: torch.Tensor) -> list[int | None]:
    """The first of the largest in each row, or None."""
    kernels = operators_for(logits.device).kernels
    if kernels is None or logits.dtype not in DTYPES:
        # Finds NaN if there is any, and -inf only if there is nothing else.
        first = logits.argmax(-1)
        finite = logits.gather(-1, first[:, None]).isfinite().squeeze(-1)
        return [token if ok else None for token, ok in zip(first.tolist(), finite.tolist(), strict=True)]
    # torch's own takes ten times as long for bfloat16.
    logits = logits.contiguous()
    found = torch.empty(len(logits), dtype=torch.int64)
    kernels.likeliest(
        DTYPES[logits.dtype], logits.data_ptr(), *logits.shape, found.data_ptr(), torch.get_num_threads()
    )
    return [None if token < 0 else token for token in found.tolist()]


def _draw(
    logits: torch.Tensor, largest: torch.Tensor, params: list[SamplingParams], noise: torch.Tensor
) -> list[int | None]:
    """Draw a token for each row.

    Args:
        logits: float32 [rows, vocabulary]; written to.
        largest: int64 [rows], the position of each row's largest logit, which is finite.
    """

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    # Divide the differences to the largest, not the logits: with a low temperature those would overflow
    # float32, or be rounded by more than they differ.
    logits -= logits.gather(-1, largest[:, None])
    logits /= column([p.temperature for p in params])
    probabilities = logits.softmax(-1)
    if any(p.top_k or p.top_p < 1.0 for p in params):
        threshold = _smallest_kept(probabilities, params)
        probabilities = probabilities.masked_fill(probabilities < threshold, 0.0)
        probabilities /= probabilities.sum(-1, keepdim=True)
    floor = column([p.min_p for p in params]) * probabilities.amax(-1, keepdim=True)
    probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
    # The draw is by inverse cumulative distribution over token ids, in float64: float32 sums over a large
    # vocabulary would round rare tokens away.
    cumulative = probabilities.double().cumsum(-1)
    totals = cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, noise[:, None] * totals, right=True).squeeze(-1)
    # False for NaN too, so a row that went wrong gets no token rather than a random one.
    sound = (totals > 0).squeeze(-1).tolist()
    last = logits.shape[-1] - 1
    return [min(token, last) if ok else None for token, ok in zip(picked.tolist(), sound, strict=True)]


def _smallest_kept(probabilities: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """The probability of the least likely token that top_k, then top_p keep, [rows, 1]; tokens of equal
    probability share their fate, whatever their ids."""
    vocabulary = probabilities.shape[-1]
    top_k = torch.tensor([p.top_k or vocabulary for p in params], device=probabilities.device)[:, None]
    top_p = torch.tensor([p.top_p for p in params], device=probabilities.device)[:, None]
    everything = (top_k >= vocabulary) & (top_p >= 1.0)
    for candidates in dict.fromkeys((min(_CANDIDATES, vocabulary), vocabulary)):
        ranked = probabilities.topk(candidates).values
        # top_p is measured on what top_k leaves.
        within_k = torch.arange(candidates, device=ranked.device) < top_k
        kept = ranked * within_k
        total = kept.sum(-1, keepdim=True)
        total = torch.where(top_k > candidates, torch.ones_like(total), total)
        before = kept.cumsum(-1) - kept
        keep = within_k & ((before < top_p * total) | (top_p >= 1.0))
        keep[:, 0] = True
        last = keep.sum(-1, keepdim=True) - 1
        # Settled unless the set may go on behind the candidates.
        settled = (last < candidates - 1) | (top_k <= candidates) | everything
        if candidates == vocabulary or bool(settled.all()):
            return ranked.gather(-1, last).masked_fill(everything, 0.0)
    raise AssertionError("unreachable")
