"""Activated LoRA: from its invocation tokens on as PEFT's, before them the base to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from polygraft.adapters.compile import compile_adapter, run_to_end
from polygraft.adapters.files.store import read_folder
from polygraft.adapters.limits import AdapterLimits
from polygraft.engine.engine import Engine
from polygraft.errors import AdapterInvalid, InvalidRequest
from polygraft_types.requests import AdapterRef, Request, ScoreRequest, StoppingParams
from tests.engines import greedy, make_engine, run_greedy
from tests.equivalence.reference import generate, load_reference
from tests.peft_folders import TARGETS, save_adapter
from tests.tiny import CONFIGS

INVOCATION = [70, 9, 200]
STEPS = 8
BEFORE = [7 * i % 250 for i in range(41)]
PROMPTS = {
    "at the end": [*BEFORE, *INVOCATION],
    "in the middle": [*BEFORE[:19], *INVOCATION, *BEFORE[:9]],
    "twice": [*BEFORE[:5], *INVOCATION, *BEFORE[:20], *INVOCATION, 4, 5],
    "at the start": [*INVOCATION, *BEFORE[:20]],
    "a part of it before": [*BEFORE[:8], *INVOCATION[:2], *INVOCATION, *INVOCATION[:2]],
}


@pytest.fixture(scope="module")
def store(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = folder = tmp_path_factory.mktemp(architecture)
            save_adapter(folder / "lora", tiny_model(architecture), architecture, "lora")
            torch.manual_seed(5)
            base = AutoModelForCausalLM.from_pretrained(tiny_model(architecture), dtype=torch.float32)
            config = LoraConfig(
                r=4,
                alora_invocation_tokens=INVOCATION,
                target_modules=TARGETS[architecture],
                task_type="CAUSAL_LM",
            )
            model = get_peft_model(base, config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.normal_(std=0.2)
            model.save_pretrained(folder / "alora")
        return made[architecture]

    return get


@pytest.mark.parametrize("architecture", CONFIGS)
def test_tokens_are_pefts_alone_and_among_others(
    tiny_model: Callable[[str], Path], store: Callable[[str], Path], architecture: str
) -> None:
    engine = make_engine(tiny_model(architecture), store(architecture), max_num_batched_tokens=24)
    reference = load_reference(tiny_model(architecture), store(architecture) / "alora", "float32")
    expected = {name: generate(reference, prompt, STEPS).tokens for name, prompt in PROMPTS.items()}
    base = load_reference(tiny_model(architecture), None, "float32")
    assert (
        sum(expected[name] != generate(base, prompt, STEPS).tokens for name, prompt in PROMPTS.items()) >= 3
    )
    requests = [greedy(name, prompt, "alora", STEPS) for name, prompt in PROMPTS.items()]
    for request in requests:
        assert run_greedy(engine, [request]) == [expected[request.id]]
    others = [greedy(f"{n}", BEFORE[: 9 + 9 * n], ["lora", None][n % 2], STEPS) for n in range(4)]
    alone = [run_greedy(engine, [other])[0] for other in others]
    mixed = run_greedy(engine, [*others[:2], *requests, *others[2:]])
    assert mixed == [*alone[:2], *expected.values(), *alone[2:]]


@pytest.fixture
def engine(llama: Path, store: Callable[[str], Path]) -> Engine:
    return make_engine(llama, store("llama"))


def cached_of(engine: Engine, name: str | None, prompt: list[int]) -> int:
    [outputs] = engine.generate([greedy("r", prompt, name, 2)])
    assert outputs[-1].finished is not None
    return outputs[-1].finished.usage.cached_tokens


def test_what_is_before_the_invocation_is_shared_with_the_base(engine: Engine) -> None:
    prompt = PROMPTS["at the end"]  # 41 tokens before it, blocks of 16
    assert cached_of(engine, None, prompt) == 0
    assert cached_of(engine, "alora", prompt) == 32
    assert cached_of(engine, "lora", prompt) == 0
    engine = make_engine(Path(engine.config.model), engine.config.adapters)
    assert cached_of(engine, "alora", [*prompt, *BEFORE]) == 0
    assert cached_of(engine, None, [*prompt, *BEFORE]) == 32
    assert cached_of(engine, "alora", [*prompt, *BEFORE]) == 80


def test_a_prompt_without_the_invocation_is_refused(engine: Engine) -> None:
    refs = (AdapterRef("alora"),)
    without = tuple(INVOCATION[:2] + BEFORE)
    for request in (
        Request("r", without, refs, stopping=StoppingParams(max_new_tokens=1)),
        ScoreRequest("s", without, (tuple(INVOCATION),), refs),
    ):
        with pytest.raises(InvalidRequest, match=r"prompt: doesn't hold the tokens \[70, 9, 200\]"):
            engine.submit(request)
    with pytest.raises(InvalidRequest, match="an activated LoRA begins inside a prompt"):
        engine.submit(Request("t", tuple(PROMPTS["twice"]), (*refs, AdapterRef("lora"))))
    engine.check_integrity()


def test_a_score_is_of_what_generating_gives(engine: Engine) -> None:
    prompt = PROMPTS["in the middle"]
    [tokens] = run_greedy(engine, [greedy("g", prompt, "alora", 4)])
    [outputs] = engine.generate([ScoreRequest("s", tuple(prompt), (tuple(tokens),), (AdapterRef("alora"),))])
    assert outputs[-1].scores[0].is_greedy


def test_it_is_loaded_without_a_warning_and_not_merged(engine: Engine) -> None:
    info = engine.adapters.registry.get("alora")
    assert info.warnings == ()
    assert not info.mergeable


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"alora_invocation_tokens": [70, 288]}, "alora_invocation_tokens holds 288, which is no token"),
        ({"alora_invocation_tokens": [True]}, "holds True, which is no token"),
        ({"alora_invocation_tokens": "70"}, "alora_invocation_tokens has the wrong type: '70'"),
        ({"use_dora": True}, "alora_invocation_tokens with use_dora has no meaning"),
    ],
)
def test_bad_configurations(
    engine: Engine, store: Callable[[str], Path], tmp_path: Path, change: dict[str, object], problem: str
) -> None:
    folder = read_folder("alora", store("llama") / "alora", 2**26)
    folder.config.update(change)
    with pytest.raises(AdapterInvalid, match=problem):
        run_to_end(compile_adapter(folder, engine.base.spec, AdapterLimits()))
