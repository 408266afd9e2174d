"""The architectures of `tests/architectures.py`, by the rules of the matrix: each with a LoRA on all of its linear
modules, a prefix, a soft prompt and the base, mixed in a batch and alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig

from tests.architectures import MATRIX, SMOKE, WINDOW
from tests.equivalence.cases import (
    BASE,
    Answers,
    Case,
    check_as_near_as_peft,
    check_exact,
    check_rows_differ,
    make_case,
)
from tests.peft_folders import CAUSAL, save_random_adapter
from tests.tiny import save_random_model

ALL = {**MATRIX, **SMOKE}
STEPS = 4
# Contexts longer than twice the window, a prefix longer than it, and prompts that aren't whole blocks.
LENGTHS = {BASE: 27, "lora": 20, "prefix": 13, "prompt": 12}


def configs(architecture: str) -> dict[str, PeftConfig]:
    """One adapter for each row but the base's."""
    return {
        "lora": LoraConfig(r=3, lora_alpha=6, target_modules=list(ALL[architecture].targets), **CAUSAL),
        "prefix": PrefixTuningConfig(num_virtual_tokens=WINDOW + 3, **CAUSAL),
        "prompt": PromptTuningConfig(num_virtual_tokens=6, **ALL[architecture].prompt, **CAUSAL),
    }


def prompts() -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(1)
    return {
        row: torch.randint(0, 250, (length,), generator=generator).tolist()
        for row, length in LENGTHS.items()
    }


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    @functools.cache
    def answers(architecture: str) -> Answers:
        folder = tmp_path_factory.mktemp(architecture)
        settings = ALL[architecture].config
        model = save_random_model(folder / "model", architecture, settings, vectors=True)
        for seed, (row, config) in enumerate(configs(architecture).items()):
            save_random_adapter(folder / "store" / row, model, config, seed)
        return Answers(model, folder / "store", prompts(), STEPS)

    return functools.cache(lambda architecture, precision: make_case(answers(architecture), precision))


@pytest.mark.parametrize("row", LENGTHS)
@pytest.mark.parametrize("architecture", ALL)
def test_float32_gives_the_same_tokens(case: Callable[[str, str], Case], architecture: str, row: str) -> None:
    check_exact(case(architecture, "float32"), row)


@pytest.mark.parametrize("architecture", ALL)
def test_the_lora_is_on_every_linear_module_but_the_head(
    case: Callable[[str, str], Case], architecture: str
) -> None:
    engine = case(architecture, "float32").engine
    body = {name for name, shape in engine.base.spec.linears.items() if not shape.is_head}
    untargeted = {name for name in body if name.rpartition(".")[2] in ALL[architecture].untargeted}
    assert engine.adapters.registry.compiled("lora").low_rank.keys() == body - untargeted


@pytest.mark.parametrize("architecture", ALL)
def test_every_adapter_differs_from_the_base_and_from_every_other(
    case: Callable[[str, str], Case], architecture: str
) -> None:
    check_rows_differ(case(architecture, "float32"))


@pytest.mark.parametrize("row", LENGTHS)
@pytest.mark.parametrize("architecture", MATRIX)
def test_bfloat16_is_as_near_as_peft(case: Callable[[str, str], Case], architecture: str, row: str) -> None:
    check_as_near_as_peft(case(architecture, "bfloat16"), row)
