"""The vocabulary's nearest tokens, against a plain computation."""

from __future__ import annotations

import pytest
import torch

from polygraft.adapters import nearest
from polygraft.adapters.nearest import nearest_tokens
from polygraft.core.primitives import SoftPrompt
from polygraft_types.adapters import NearestToken


def run(prompt: torch.Tensor, table: torch.Tensor, count: int) -> list[list[NearestToken]]:
    job = nearest_tokens(SoftPrompt(prompt), table, count, lambda token: f"<{token}>")
    while True:
        try:
            next(job)
        except StopIteration as stop:
            return stop.value


@pytest.mark.parametrize("rows", [7, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_a_plain_computation(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "_ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(50, 12, generator=generator).to(dtype)
    prompt = torch.randn(4, 12, generator=generator).to(dtype)
    got = run(prompt, table, 5)
    for virtual, near in zip(prompt, got, strict=True):
        cosine = torch.nn.functional.cosine_similarity(virtual.float()[None], table.float())
        values, ids = cosine.sort(descending=True)
        assert [token.token_id for token in near] == ids[:5].tolist()
        assert [token.text for token in near] == [f"<{i}>" for i in ids[:5].tolist()]
        assert torch.allclose(torch.tensor([token.similarity for token in near]), values[:5], atol=1e-6)


def test_a_token_itself_is_the_nearest_whatever_its_length() -> None:
    table = torch.eye(6)
    assert [near[0] for near in run(3 * table[[4, 2]], table, 1)] == [
        NearestToken(4, "<4>", 1.0),
        NearestToken(2, "<2>", 1.0),
    ]


def test_more_than_the_vocabulary_has() -> None:
    assert len(run(torch.ones(1, 3), torch.eye(3), 100)[0]) == 3


def test_embeddings_of_zeros_are_near_to_nothing() -> None:
    assert [token.similarity for token in run(torch.zeros(1, 3), torch.eye(3), 2)[0]] == [0.0, 0.0]
