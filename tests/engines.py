"""Engines over tiny models, and what tests ask of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from polygraft.base.loader import load_base
from polygraft.config import ServerConfig
from polygraft.engine.engine import Engine
from polygraft.engine.sequences.sequence import SmokeTestSequence
from polygraft_types.answers import FinishReason
from polygraft_types.requests import AdapterRef, CombinationType, LoraPath, Request, StoppingParams


def make_engine(
    model: Path,
    store: Path | None = None,
    *,
    precision: str = "float32",
    native: bool = True,
    **settings: object,
) -> Engine:
    """An engine with every adapter of the store, ready to step."""
    config = ServerConfig(**{"model": str(model), "adapters": store, "kv_cache_bytes": 4 * 2**20, **settings})
    base = load_base(
        str(model),
        dtype=precision if precision in ("float32", "float16") else "bfloat16",
        quantization=precision if precision in ("int8", "nf4", "fp4") else "none",
    )
    engine = Engine(base, config, native=native)
    engine.adapters.load_store()
    engine.finish_background()
    return engine


def greedy(id: str, prompt: list[int], adapter: str | None, steps: int, **stopping: object) -> Request:
    """A greedy request for exactly so many tokens."""
    return Request(
        id,
        tuple(prompt),
        adapters=() if adapter is None else (AdapterRef(adapter),),
        stopping=StoppingParams(max_new_tokens=steps, ignore_eos=True, **stopping),
    )


def run_greedy(engine: Engine, requests: list[Request]) -> list[list[int]]:
    """Tokens of each request, run together; the engine must be clean afterwards."""
    tokens = []
    for outputs in engine.generate(requests):
        assert [o.terminal for o in outputs] == [False] * (len(outputs) - 1) + [True]
        assert outputs[-1].finished is not None, outputs[-1].error
        assert outputs[-1].finished.reason == FinishReason.LENGTH
        tokens.append([token for output in outputs for token in output.token_ids])
    assert not engine.has_work
    engine.check_integrity()
    return tokens


def forced_logits(
    engine: Engine,
    rows: Sequence[tuple[list[int], str | tuple[AdapterRef, ...] | None]],
    combined: Sequence[CombinationType] = (),
) -> torch.Tensor:
    """Logits [rows, vocabulary] behind each token list under its adapters, all in the same steps.

    Args:
        combined: what each row's adapters are together, if not stacks.
    """
    sequences = []
    for at, (tokens, name) in enumerate(rows):
        refs = () if name is None else (AdapterRef(name),) if isinstance(name, str) else name
        stack = engine.intake.resolve(refs, *combined[at : at + 1])
        sequences.append(SmokeTestSequence(f"forced-{at}", tokens, stack, engine.base.spec.vocabulary_size))
        engine.paths.queue(sequences[-1])
        engine.scheduler.add(sequences[-1])
    while engine.scheduler.has_work:
        engine.step()
    engine.check_integrity()
    return torch.cat([sequence.logits for sequence in sequences if sequence.logits is not None])


def merged_logits(engine: Engine, tokens: list[int], adapter: str) -> torch.Tensor:
    """Logits [vocabulary] behind some tokens, on the adapter's merged copy."""
    sequence = SmokeTestSequence(
        "merged", tokens, engine.intake.resolve((AdapterRef(adapter),)), engine.base.spec.vocabulary_size
    )
    sequence.path = LoraPath.MERGED
    engine.paths.queue(sequence)
    engine.scheduler.add(sequence)
    while engine.has_work:
        engine.step()
    engine.check_integrity()
    assert sequence.copy is not None
    assert sequence.logits is not None
    return sequence.logits[0]
