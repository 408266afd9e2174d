"""What each precision costs in accuracy: perplexity of the base on text that ships with Python.

Windows of a standard module's source are forced through the engine's own decode steps, all at once. The last
line is a JSON object by precision: perplexity, the share of positions at which the likeliest token is
float32's, and how far log-probabilities are from float32's (root of the mean square over the `NEAREST`
likeliest tokens of each position). With `--libraries` transformers computes the same, in bfloat16 and with
bitsandbytes' int8 at both thresholds.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from polygraft.base.model_folder import resolve_model
from polygraft.config import ServerConfig
from polygraft.engine.engine import Engine
from polygraft.engine.load_engine import load_engine
from polygraft.engine.requests import generating
from polygraft_types.requests import Request, SamplingParams, StoppingParams

WINDOWS, TOKENS, NEAREST = 8, 256, 16
PRECISIONS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int8, head int8": {"dtype": "bfloat16", "quantization": "int8", "head_quantization": "int8"},
    "nf4": {"dtype": "bfloat16", "quantization": "nf4"},
    "fp4": {"dtype": "bfloat16", "quantization": "fp4"},
}
LIBRARIES = {
    "transformers bfloat16": None,
    "bitsandbytes int8, threshold 0": 0.0,
    "bitsandbytes int8, threshold 6": 6.0,
}
"""Thresholds by name."""


def windows(engine: Engine) -> list[list[int]]:
    """Token ids [WINDOWS][TOKENS]."""
    text = inspect.getsource(textwrap) + inspect.getsource(argparse)
    ids = engine.base.tokenizer.encode(text, special=True)
    assert len(ids) >= WINDOWS * TOKENS
    return [ids[n * TOKENS : (n + 1) * TOKENS] for n in range(WINDOWS)]


class Exact:
    """The likeliest tokens of every position and their log-probabilities, of the first that is measured."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def compare(self, window: int, position: int, scores: torch.Tensor) -> tuple[bool, float]:
        """Whether the likeliest token is the same, and the mean square of the errors.

        Args:
            scores: log-probabilities [vocabulary].
        """
        if (window, position) not in self._found:
            top = scores.topk(NEAREST)
            self._found[window, position] = top.indices, top.values
        tokens, exact = self._found[window, position]
        same = int(scores.argmax()) == int(tokens[0])
        return same, float((scores[tokens] - exact).square().mean())


class Measured:
    """Adds up the errors of one precision.

    Args:
        texts: token ids of the windows.
    """

    def __init__(self, texts: list[list[int]], exact: Exact) -> None:
        self._texts = texts
        self._exact = exact
        self._rows = self._same = 0
        self._total = self._squares = 0.0

    def note(self, window: int, position: int, logits: torch.Tensor) -> int:
        """Note the logits [vocabulary] before a position of a window; returns the token that stands there."""
        target = self._texts[window][position]
        scores = logits.float().log_softmax(-1)
        same, squares = self._exact.compare(window, position, scores)
        self._rows += 1
        self._same += same
        self._squares += squares
        self._total -= float(scores[target])
        return target

    @property
    def result(self) -> dict[str, float]:
        """The figures."""
        return {
            "perplexity": round(math.exp(self._total / self._rows), 3),
            "same_token": round(self._same / self._rows, 4),
            "logprob_error": round(math.sqrt(self._squares / self._rows), 4),
        }


def forced(engine: Engine, exact: Exact) -> dict[str, float]:
    """Of our engine."""
    texts = windows(engine)
    measured = Measured(texts, exact)

    def force(logits: torch.Tensor, params: list[SamplingParams], positions: list[int]) -> list[int]:
        # A request's seed is its window.
        return [measured.note(p.seed, at, row) for row, p, at in zip(logits, params, positions, strict=True)]

    original, generating.sample = generating.sample, force
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
        generating.sample = original
    return measured.result


def by_transformers(
    model: str, texts: list[list[int]], exact: Exact, threshold: float | None
) -> dict[str, float]:
    """Of transformers in bfloat16, a window in one forward.

    Args:
        threshold: of bitsandbytes' int8; None is unquantized.
    """
    options: dict[str, Any] = {}
    if threshold is not None:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
        options = {"quantization_config": config, "device_map": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        resolve_model(model), dtype=torch.bfloat16, **options
    ).eval()
    measured = Measured(texts, exact)
    for window, text in enumerate(texts):
        with torch.inference_mode():
            logits = loaded(torch.tensor([text])).logits[0]
        for position in range(1, len(text)):
            measured.note(window, position, logits[position - 1])
    return measured.result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--libraries", action="store_true", help="transformers' and bitsandbytes' as well")
    args = parser.parse_args()
    result: dict[str, dict[str, float]] = {}
    exact = Exact()
    texts: list[list[int]] = []
    for name, settings in PRECISIONS.items():
        engine = load_engine(ServerConfig(**{"model": args.model, "kv_cache_bytes": 128 * 2**20, **settings}))
        texts = windows(engine)
        megabytes = round(engine.model.weight_bytes / 1e6, 1)
        result[name] = {**forced(engine, exact), "weight_mb": megabytes}
        print(f"{name:10} {result[name]}", flush=True)
    for name, threshold in LIBRARIES.items() if args.libraries else ():
        result[name] = by_transformers(args.model, texts, exact, threshold)
        print(f"{name:10} {result[name]}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
