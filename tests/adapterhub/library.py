"""What AdapterHub's own library saved and computed, as `make_fixtures.py` left it."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

FIXTURES = Path(__file__).parent / "fixtures"
ARCHITECTURES = ("llama", "gpt2", "qwen2", "gemma3_text")
REFUSED = (("gemma3_text", "seq_bn"),)
"""Folders that the library runs and that aren't served."""
_PROMPT = json.loads((FIXTURES / "prompt.json").read_text())
PROMPT: list[int] = _PROMPT["tokens"]
ROWS: list[int] = _PROMPT["rows"]
"""Those of the prompt that logits are stored of."""


def base_folder(architecture: str) -> Path:
    """The tiny model that an architecture's adapters are for."""
    return FIXTURES / architecture / "base"


def keys(architecture: str) -> list[str]:
    """Names of an architecture's adapters."""
    return sorted(key for key in expected(architecture) if key != "base")


@functools.cache
def expected(architecture: str) -> dict[str, torch.Tensor]:
    """The library's logits [ROWS, vocabulary] by adapter, the base's own as "base"."""
    logits = load_file(FIXTURES / architecture / "expected.safetensors")
    return {key: out for key, out in logits.items() if (architecture, key) not in REFUSED}


@functools.cache
def bfloat16_errors(architecture: str) -> dict[str, float]:
    """The library's own error in bfloat16 by adapter, root mean square over all rows of the prompt."""
    errors: dict[str, float] = json.loads((FIXTURES / architecture / "bfloat16.json").read_text())
    return errors


CASES = [(architecture, key) for architecture in ARCHITECTURES for key in keys(architecture)]
