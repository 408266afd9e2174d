"""What a recipe is, and how to find one: `adapters/<name>/recipe.py` beside the adapter that it makes.

Needs nothing but the standard library, so that answers can be scored where no torch is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADAPTERS = Path(__file__).parent
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

Example = tuple[str, str]
"""The user's prompt and the wanted answer."""


@dataclass(frozen=True, slots=True)
class Training:
    """How one adapter is trained: AdamW, linear warm-up over a tenth of the steps, then cosine decay."""

    steps: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything needed to make one adapter again and to judge it."""

    name: str
    peft: dict[str, Any]
    """`peft_type` and the arguments of PEFT's config class; empty for a bottleneck adapter."""
    bottleneck: dict[str, Any]
    """Of a bottleneck adapter: `reduction_factor`, as AdapterHub's `SeqBnConfig` has it; else empty."""
    quantization: str
    """Of the base that it is trained and measured on: "none" or "nf4"."""
    training: Training
    train: list[Example]
    held_out: list[Example]
    """Built from words and phrases that `train` doesn't contain; what they are is the recipe's business."""
    score: Callable[[str, str, str], float]
    """`score(prompt, expected, answer)`, from 0 to 1."""
    max_new_tokens: int
    init_text: str = ""
    """What a prefix starts as the keys and values of, and P-tuning's prompt as the embeddings of."""


def names() -> list[str]:
    """Every adapter that has a recipe."""
    return sorted(path.parent.name for path in ADAPTERS.glob("*/recipe.py"))


def load(name: str) -> Recipe:
    """Import `adapters/<name>/recipe.py`, whose folder's name need not be a Python identifier."""
    path = ADAPTERS / name / "recipe.py"
    if not path.is_file():
        raise SystemExit(f"no recipe for {name!r}; there are: {', '.join(names())}")
    spec = importlib.util.spec_from_file_location(f"recipe_{name.replace('-', '_')}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # A task that several kinds are trained on is a module beside this one.
    task = importlib.import_module(module.TASK) if hasattr(module, "TASK") else module
    train = task.train_examples()
    held_out = task.held_out_examples()
    seen = {prompt for prompt, _ in train}
    assert not any(prompt in seen for prompt, _ in held_out), f"{name}: a held-out prompt is trained on"
    return Recipe(
        name=name,
        peft=getattr(module, "PEFT", {}),
        bottleneck=getattr(module, "BOTTLENECK", {}),
        quantization=getattr(module, "QUANTIZATION", "none"),
        training=Training(**module.TRAINING),
        train=train,
        held_out=held_out,
        score=task.score,
        max_new_tokens=task.MAX_NEW_TOKENS,
        init_text=getattr(module, "INIT_TEXT", ""),
    )


def read_held_out(name: str) -> list[Example]:
    """The held-out examples as they lie in `adapters/<name>/eval.jsonl`."""
    lines = (ADAPTERS / name / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["prompt"], row["expected"]) for row in map(json.loads, lines)]
