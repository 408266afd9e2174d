"""The architectures of `tests/architectures.py`, by the rules of the matrix: each with a LoRA on all of its
linear modules, a prefix, a soft prompt and the base, alone and mixed in one batch.

`make test` has each of them in float32, and each precision on those that differ most from what the matrix has;
`make test-full` has the others too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import pytest
import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM

from polygraft.errors import ContextLengthExceeded
from tests.architectures import EXPERTS, LONG, MATRIX, SMOKE, WINDOW
from tests.engines import greedy, run_greedy
from tests.equivalence.cases import (
    BASE,
    TOLERANCE,
    Answers,
    Case,
    check_as_near_as_peft,
    check_exact,
    check_rows_differ,
    make_case,
    random_answers,
)
from tests.equivalence.reference import generate
from tests.peft_folders import CAUSAL

ALL = {**MATRIX, **SMOKE}
STEPS = 4
# Contexts longer than twice the window, and prompts that aren't whole blocks. Of the prefix, which is longer than
# the window, and of the soft prompt two layers still see something at the end.
LENGTHS = {BASE: 27, "lora": 20, "prefix": 13, "prompt": 12}
QUICK = {
    "float32": {*MATRIX, "qwen2_moe"},
    "bfloat16": {"mixtral", "gemma2", "phi3", "gpt_neox", "gpt_oss", "glm4"},
    "int8": {"gpt_neox"},
    "nf4": {"phi3"},
}
"""What `make test` has of each precision."""


def marked(precision: str, architectures: Iterable[str]) -> list[object]:
    """The architectures, marked where `make test` leaves them out."""
    return [
        name if name in QUICK[precision] else pytest.param(name, marks=pytest.mark.full)
        for name in architectures
    ]


def rows_of(architecture: str) -> list[str]:
    """What is served on it."""
    return [row for row in LENGTHS if row != "prefix" or ALL[architecture].has_prefixes]


def marked_rows(precision: str, architectures: Iterable[str]) -> list[object]:
    """Each architecture with each of its rows, marked likewise."""
    return [
        pytest.param(name, row, marks=() if name in QUICK[precision] else pytest.mark.full)
        for name in architectures
        for row in rows_of(name)
    ]


def configs(architecture: str) -> dict[str, PeftConfig]:
    """One adapter for each row but the base's."""
    all_rows: dict[str, PeftConfig] = {
        "lora": LoraConfig(r=3, lora_alpha=6, target_modules=list(ALL[architecture].targets), **CAUSAL),
        "prefix": PrefixTuningConfig(num_virtual_tokens=WINDOW + 3, **CAUSAL),
        "prompt": PromptTuningConfig(num_virtual_tokens=6, **ALL[architecture].prompt, **CAUSAL),
    }
    return {row: all_rows[row] for row in rows_of(architecture) if row != BASE}


def tokens(length: int, seed: int) -> list[int]:
    return torch.randint(0, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    @functools.cache
    def answers(architecture: str, all_experts: bool) -> Answers:
        chosen = {"num_experts_per_tok": EXPERTS} if all_experts else {}
        config = {**ALL[architecture].config, **chosen}
        prompts = {row: tokens(LENGTHS[row], seed) for seed, row in enumerate(rows_of(architecture))}
        folder = tmp_path_factory.mktemp(architecture)
        return random_answers(folder, architecture, config, configs(architecture), prompts, STEPS)

    @functools.cache
    def get(architecture: str, precision: str) -> Case:
        # Two experts that a row likes equally well change places by a rounding, in PEFT as here, and then the
        # logits are others altogether. So coarser precisions choose all, and float32 two of them.
        chooses = "num_experts_per_tok" in ALL[architecture].config
        return make_case(answers(architecture, chooses and precision != "float32"), precision)

    return get


@pytest.mark.parametrize(("architecture", "row"), marked_rows("float32", ALL))
def test_float32_gives_the_same_tokens(case: Callable[[str, str], Case], architecture: str, row: str) -> None:
    check_exact(case(architecture, "float32"), row)


@pytest.mark.parametrize("architecture", marked("float32", ALL))
def test_the_lora_is_on_every_linear_module_but_the_head(
    case: Callable[[str, str], Case], architecture: str
) -> None:
    engine = case(architecture, "float32").engine
    body = {name for name, shape in engine.base.spec.linears.items() if not shape.is_head}
    untargeted = {name for name in body if name.rpartition(".")[2] in ALL[architecture].untargeted}
    assert engine.adapters.registry.compiled("lora").modules.keys() == body - untargeted


@pytest.mark.parametrize("architecture", marked("float32", ALL))
def test_every_adapter_differs_from_the_base_and_from_every_other(
    case: Callable[[str, str], Case], architecture: str
) -> None:
    check_rows_differ(case(architecture, "float32"))


@pytest.mark.parametrize("architecture", marked("float32", (name for name in ALL if ALL[name].off)))
def test_without_what_sets_it_apart_it_answers_otherwise(
    case: Callable[[str, str], Case], architecture: str
) -> None:
    this = case(architecture, "float32")
    ids = torch.tensor([this.prompts[BASE]])
    for settings in ALL[architecture].off:
        model = AutoModelForCausalLM.from_pretrained(
            this.engine.config.model, dtype=torch.float32, **settings
        )
        with torch.inference_mode():
            logits = model.eval()(ids).logits[0, -1]
        assert (logits - this.exact[BASE].logits[0]).abs().max() > 10 * TOLERANCE, settings


def test_attention_sinks_matter(case: Callable[[str, str], Case]) -> None:
    this = case("gpt_oss", "float32")
    model = AutoModelForCausalLM.from_pretrained(this.engine.config.model, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.constant_(parameter, -1e9)
    with torch.inference_mode():
        logits = model(torch.tensor([this.prompts[BASE]])).logits[0, -1]
    assert (logits - this.exact[BASE].logits[0]).abs().max() > 10 * TOLERANCE


def test_long_rope_is_exact_up_to_its_original_length_and_refused_beyond(
    case: Callable[[str, str], Case],
) -> None:
    this = case("phi3", "float32")
    assert this.engine.model.context_length == LONG
    assert this.engine.model.notes == (
        f"context capped at {LONG} of 256 tokens: longrope RoPE is exact in a mixed step only up to its "
        "original length",
    )
    longest = tokens(LONG - STEPS, 9)
    model = AutoModelForCausalLM.from_pretrained(this.engine.config.model, dtype=torch.float32).eval()
    expected = [generate(model, longest, STEPS).tokens, this.exact[BASE].tokens]
    requests = [greedy("long", longest, None, STEPS), greedy("short", this.prompts[BASE], None, STEPS)]
    assert run_greedy(this.engine, requests) == expected
    with pytest.raises(ContextLengthExceeded, match=f"the context holds {LONG}"):
        this.engine.submit(greedy("longer", [*longest, 1], None, STEPS))
    # Virtual tokens have positions as well.
    with pytest.raises(ContextLengthExceeded, match=f"{WINDOW + 3} virtual tokens"):
        this.engine.submit(greedy("behind", longest, "prefix", STEPS))
    assert not this.engine.has_work


@pytest.mark.parametrize(("architecture", "row"), marked_rows("bfloat16", MATRIX))
def test_bfloat16_is_as_near_as_peft(case: Callable[[str, str], Case], architecture: str, row: str) -> None:
    check_as_near_as_peft(case(architecture, "bfloat16"), row)


@pytest.mark.parametrize(
    ("architecture", "row"), marked_rows("int8", ["gemma2", "gpt_neox", "glm4", "mixtral"])
)
def test_int8_is_as_near_as_peft(case: Callable[[str, str], Case], architecture: str, row: str) -> None:
    check_as_near_as_peft(case(architecture, "int8"), row)


@pytest.mark.parametrize(("architecture", "row"), marked_rows("nf4", ["gemma2", "phi3", "opt", "gpt_oss"]))
def test_nf4_is_as_near_as_peft(case: Callable[[str, str], Case], architecture: str, row: str) -> None:
    check_as_near_as_peft(case(architecture, "nf4"), row)
