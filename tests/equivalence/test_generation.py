"""What is generated in float16 and fp4, each token along the engine's own answer.

The weights are PEFT's own in that precision, so between its logits and ours lies rounding alone: a token that
PEFT doesn't find the likeliest may only be there where the two are closer than twice what rounding does.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polygraft.base.loader import load_base
from polygraft.config import ServerConfig
from polygraft.engine.engine import Engine
from polygraft_types.answers import FinishReason
from tests.engine.asking import PROMPT
from tests.engines import greedy, make_engine, run_greedy
from tests.equivalence.reference import forced, load_reference

ADAPTERS = [None, "lora", "prefix", "p-tuning"]
STEPS = 8


@pytest.mark.parametrize("precision", ["float16", "fp4"])
def test_greedy_tokens_are_as_near_as_peft(llama: Path, llama_store: Path, precision: str) -> None:
    engine = make_engine(llama, llama_store, precision=precision)
    dtype = "float16" if precision == "float16" else "bfloat16"
    assert (engine.model.dtype, engine.model.quantization) == (dtype, "fp4" if precision == "fp4" else "none")
    requests = [greedy(f"{name}", PROMPT, name, STEPS) for name in ADAPTERS]
    answers = run_greedy(engine, requests)
    assert answers == [run_greedy(engine, [request])[0] for request in requests]
    for name, tokens in zip(ADAPTERS, answers, strict=True):
        folder = None if name is None else llama_store / name
        exact = forced(load_reference(llama, folder, "float32"), PROMPT, tokens)
        rounded = forced(load_reference(llama, folder, dtype), PROMPT, tokens)
        rounding = (rounded - exact).abs().amax(-1)
        theirs = forced(load_reference(llama, folder, precision), PROMPT, tokens)
        behind = theirs.amax(-1) - theirs.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        assert (behind <= 2 * rounding).all()


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_float16_with_quantized_weights(llama: Path, quantization: str) -> None:
    base = load_base(str(llama), dtype="float16", quantization=quantization)  # type: ignore[arg-type]
    assert base.dtype is torch.float16
    assert any(note.startswith(f"{quantization}: 21 of") for note in base.notes), base.notes
    engine = Engine(base, ServerConfig(kv_cache_bytes=2**20))
    [outputs] = engine.generate([greedy("g", PROMPT, None, STEPS)])
    assert outputs[-1].finished is not None, outputs[-1].error
    assert outputs[-1].finished.reason is FinishReason.LENGTH
