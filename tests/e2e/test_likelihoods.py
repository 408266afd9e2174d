"""Score, log-probabilities and echo through a real channel agree with each other and with PEFT."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from polygraft_api.v1 import inference_pb2 as pb
from tests.e2e.conftest import Live
from tests.equivalence.reference import load_reference

PROMPT = list(range(30, 60))
ADAPTERS = ["", "lora", "prefix", "p-tuning"]


def logprobs(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> list[float]:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, -len(tokens) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()


async def test_a_mixed_burst(live: Live, llama: Path, llama_store: Path) -> None:
    generations = [
        live.inference.Generate(
            pb.GenerateRequest(
                token_ids={"ids": PROMPT},
                adapter=adapter,
                stopping={"max_new_tokens": 6, "ignore_eos": True},
                response={"token_ids": True, "top_logprobs": 2, "echo": True},
            )
        )
        for adapter in ADAPTERS
    ]
    neighbour = asyncio.ensure_future(live.neighbour("lora"))
    for adapter, call in zip(ADAPTERS, generations, strict=True):
        answer = await call
        reference = load_reference(llama, llama_store / adapter if adapter else None, "float32")
        assert list(answer.token_ids[: len(PROMPT)]) == PROMPT
        assert [token.token_id for token in answer.logprobs] == list(answer.token_ids)
        tokens = list(answer.token_ids[len(PROMPT) :])
        assert [token.logprob for token in answer.logprobs[len(PROMPT) :]] == pytest.approx(
            logprobs(reference, PROMPT, tokens), abs=2e-4
        )
        assert [token.logprob for token in answer.logprobs[1 : len(PROMPT)]] == pytest.approx(
            logprobs(reference, PROMPT[:1], PROMPT[1:]), abs=2e-4
        )
        score = await live.inference.Score(
            pb.ScoreRequest(
                token_ids={"ids": PROMPT},
                continuation_token_ids=[{"ids": tokens}, {"ids": [7, 8, 9]}],
                adapter=adapter,
            )
        )
        assert [one.is_greedy for one in score.scores] == [True, False]
        assert score.scores[0].log_likelihood == pytest.approx(
            sum(token.logprob for token in answer.logprobs[len(PROMPT) :]), abs=1e-3
        )
        assert score.scores[1].log_likelihood == pytest.approx(
            sum(logprobs(reference, PROMPT, [7, 8, 9])), abs=1e-3
        )
        assert score.adapter_generation == answer.summary.adapter_generation
    assert len(await neighbour) == 60
