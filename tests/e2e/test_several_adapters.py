"""Several adapters in a request through a real channel: answers, scores, metrics, and what leaving frees."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from polygraft.core.names import STACK, STACK_KIND
from polygraft_api.v1 import adapters_pb2 as ap
from polygraft_api.v1 import inference_pb2 as pb
from polygraft_client import AsyncClient, CombinationType
from tests.e2e.conftest import Live
from tests.equivalence.reference import generate, load_reference

PROMPT = list(range(30, 60))
WEIGHTS = {"lora": 0.5, "lora-layers": -1.25}


PEFTS = {CombinationType.STACK: "cat", CombinationType.LINEAR: "linear"}


def reference(llama: Path, llama_store: Path, combination_type: CombinationType) -> torch.nn.Module:
    base = load_reference(llama, None, "float32")
    model = PeftModel.from_pretrained(base, str(llama_store / "lora"), adapter_name="lora")
    model.load_adapter(str(llama_store / "lora-layers"), "lora-layers")
    model.add_weighted_adapter(
        list(WEIGHTS), list(WEIGHTS.values()), "all", combination_type=PEFTS[combination_type]
    )
    model.set_adapter("all")
    return model.eval()


@pytest.mark.parametrize("combination_type", CombinationType)
async def test_an_answer_a_score_and_what_is_counted(
    live: Live, llama: Path, llama_store: Path, combination_type: CombinationType
) -> None:
    expected = generate(reference(llama, llama_store, combination_type), PROMPT, 6)
    async with AsyncClient(live.address) as client:
        neighbour = asyncio.ensure_future(live.neighbour("lora"))
        answer = await client.generate(
            token_ids=PROMPT,
            adapters=list(WEIGHTS.items()),
            combination_type=combination_type,
            max_new_tokens=6,
            ignore_eos=True,
            return_token_ids=True,
        )
        assert list(answer.token_ids) == expected.tokens
        scored = await client.score(
            None,
            [expected.tokens],
            token_ids=PROMPT,
            adapters=list(WEIGHTS.items()),
            combination_type=combination_type,
        )
        registered = [await client.adapters.get(name) for name in WEIGHTS]
        assert answer.adapter_generations == tuple(adapter.generation for adapter in registered)
        assert scored.adapter_generations == answer.adapter_generations
        assert answer.adapter_generation == answer.adapter_generations[0]
        assert len(await neighbour) == 60
    told = expected.logits.log_softmax(-1).gather(-1, torch.tensor(expected.tokens)[:, None]).sum()
    assert scored.continuations[0].is_greedy
    assert scored.continuations[0].log_likelihood == pytest.approx(float(told), abs=1e-3)
    sample = live.metrics.registry.get_sample_value
    labels = {"adapter": STACK, "kind": STACK_KIND}
    assert sample("polygraft_submitted_requests_total", labels) == 2
    assert sample("polygraft_generated_tokens_total", labels) == 6
    combined = combination_type is CombinationType.LINEAR
    assert sample("polygraft_combinations") == combined
    assert bool(sample("polygraft_combined_bytes")) == combined


async def test_leaving_frees_every_adapter(live: Live) -> None:
    names = ["lora", "prompt", "lora-bias"]
    call = live.inference.GenerateStream(
        pb.GenerateRequest(
            prompt="go on",
            adapters=[pb.AdapterRef(name=name) for name in names],
            stopping={"max_new_tokens": 200, "ignore_eos": True},
        )
    )
    await call.read()
    call.cancel()
    for name in names:  # each waits for whoever holds it
        gone = await live.adapters.UnloadAdapter(ap.UnloadAdapterRequest(name=name), timeout=10)
        assert gone.adapter.name == name
    engine = live.handle._engine
    assert not engine.scheduler.has_work
    engine.check_integrity()
