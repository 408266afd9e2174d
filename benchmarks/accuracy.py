"""What each precision costs in accuracy: perplexity of the base on text that ships with Python.

Windows of a standard module's source are forced through the engine's own decode steps, all at once. The last
line is a JSON object by precision: perplexity, and the share of positions at which the likeliest token is
float32's.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import sys
import textwrap
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from polygraft.config import ServerConfig
from polygraft.engine import generations
from polygraft.engine.engine import Engine
from polygraft.engine.request import Request, SamplingParams, StoppingParams

WINDOWS, TOKENS = 8, 256
PRECISIONS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int8, head int8": {"dtype": "bfloat16", "quantization": "int8", "head_quantization": "int8"},
    "nf4": {"dtype": "bfloat16", "quantization": "nf4"},
    "fp4": {"dtype": "bfloat16", "quantization": "fp4"},
}


def windows(engine: Engine) -> list[list[int]]:
    """Token ids [WINDOWS][TOKENS]."""
    text = inspect.getsource(textwrap) + inspect.getsource(argparse)
    ids = engine.base.tokenizer.encode(text, special=True)
    assert len(ids) >= WINDOWS * TOKENS
    return [ids[n * TOKENS : (n + 1) * TOKENS] for n in range(WINDOWS)]


def forced(engine: Engine) -> tuple[float, list[int]]:
    """Perplexity, and the likeliest token at every position."""
    texts = windows(engine)
    total, likeliest = 0.0, []

    def force(logits: torch.Tensor, params: list[SamplingParams], positions: list[int]) -> list[int]:
        nonlocal total
        # A request's seed is its window.
        targets = [texts[p.seed][at] for p, at in zip(params, positions, strict=True)]
        scores = logits.float().log_softmax(-1)
        total -= float(scores[torch.arange(len(targets)), targets].sum())
        likeliest.extend(logits.argmax(-1).tolist())
        return targets

    original, generations.sample = generations.sample, force
    try:
        engine.generate(
            Request(
                f"{n}",
                (text[0],),
                sampling=SamplingParams(seed=n),
                stopping=StoppingParams(max_new_tokens=TOKENS - 1, ignore_eos=True),
            )
            for n, text in enumerate(texts)
        )
    finally:
        generations.sample = original
    return math.exp(total / len(likeliest)), likeliest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="default")
    args = parser.parse_args()
    result: dict[str, dict[str, float]] = {}
    exact: list[int] = []
    for name, settings in PRECISIONS.items():
        engine = Engine.from_config(
            ServerConfig(**{"model": args.model, "kv_cache_bytes": 128 * 2**20, **settings})
        )
        perplexity, likeliest = forced(engine)
        exact = exact or likeliest
        same = sum(a == b for a, b in zip(likeliest, exact, strict=True)) / len(exact)
        result[name] = {
            "perplexity": round(perplexity, 3),
            "same_token": round(same, 4),
            "weight_mb": round(engine.model.weight_bytes / 1e6, 1),
        }
        print(f"{name:10} {result[name]}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
