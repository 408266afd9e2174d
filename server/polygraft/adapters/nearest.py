"""Reads a soft prompt by the vocabulary's tokens nearest to each of its virtual tokens."""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch

from polygraft.core.primitives import SoftPrompt
from polygraft_types.adapters import NearestToken

_ROWS = 8192
"""Rows of the embedding table that are compared at a time: a millisecond or two."""


def nearest_tokens(
    prompt: SoftPrompt, table: torch.Tensor, count: int, text_of: Callable[[int], str]
) -> Generator[None, None, list[list[NearestToken]]]:
    """The `count` tokens whose embeddings are nearest to each virtual token's by cosine, nearest first.

    Args:
        table: [vocabulary, hidden], as the base's embedding module holds it. Where that module scales its
            output, the cosine is the same.

    Yields between pieces of the table.
    """
    virtual = torch.nn.functional.normalize(prompt.embeddings.float(), dim=-1)
    pieces = []
    for piece in torch.split(table, _ROWS):
        pieces.append(virtual @ torch.nn.functional.normalize(piece.float(), dim=-1).t())
        yield
    top = torch.cat(pieces, -1).topk(min(count, len(table)))
    return [
        [
            NearestToken(token, text_of(token), similarity)
            for token, similarity in zip(ids, values, strict=True)
        ]
        for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
