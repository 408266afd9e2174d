"""Adapters with another number of tokens than the base, and with copies of the base's own, against PEFT.

PEFT needs a model of its own for each of them, resized before the adapter is loaded; here they share steps with
adapters that know the base's tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from polygraft.engine.engine import Engine
from polygraft.errors import InvalidRequest
from polygraft_types.requests import (
    AdapterRef,
    Request,
    ResponseParams,
    SamplingParams,
    ScoreRequest,
    StoppingParams,
)
from tests.engines import forced_logits, greedy, make_engine, run_greedy
from tests.equivalence.reference import Reference, forced, generate, load_reference
from tests.peft_folders import CAUSAL, EMBEDDING, SOME_TOKENS, TARGETS
from tests.tiny import CONFIGS, VOCABULARY

STEPS = 6
TOLERANCE = 1e-4
NEW = VOCABULARY + 12
LESS = VOCABULARY - 20

Config = Callable[[str], PeftConfig]
# The number of tokens, and the adapter.
ADAPTERS: dict[str, tuple[int, Config]] = {
    "grown-saved": (NEW, lambda a: LoraConfig(
        r=4, target_modules=TARGETS[a], modules_to_save=[EMBEDDING[a], "lm_head"], **CAUSAL)),
    "grown-tokens": (NEW, lambda a: LoraConfig(
        r=4, target_modules=TARGETS[a], trainable_token_indices=[3, 70, *range(VOCABULARY, NEW - 2)], **CAUSAL)),
    "grown-embedding": (NEW, lambda a: LoraConfig(
        r=4, target_modules=[*TARGETS[a], EMBEDDING[a], "lm_head"], **CAUSAL)),
    "grown-plain": (NEW, lambda a: LoraConfig(r=4, target_modules=TARGETS[a], **CAUSAL)),
    # Of an untied head that isn't trained PEFT saves no rows.
    "grown-trained": (NEW, lambda a: TrainableTokensConfig(
        token_indices=list(range(VOCABULARY - 30, NEW)),
        target_modules=[EMBEDDING[a], *["lm_head"] * (a == "qwen2")], **CAUSAL)),
    "grown-prompt": (NEW, lambda a: PromptTuningConfig(num_virtual_tokens=5, **CAUSAL)),
    "shrunk-saved": (LESS, lambda a: LoraConfig(
        r=4, target_modules=TARGETS[a], modules_to_save=[EMBEDDING[a], "lm_head"], **CAUSAL)),
    "shrunk-embedding": (LESS, lambda a: LoraConfig(
        r=4, target_modules=[*TARGETS[a], EMBEDDING[a], "lm_head"], **CAUSAL)),
    "tokens": (VOCABULARY, lambda a: LoraConfig(
        r=4, target_modules=TARGETS[a], trainable_token_indices=SOME_TOKENS, **CAUSAL)),
    "copied": (VOCABULARY, lambda a: LoraConfig(
        r=4, target_modules=[*TARGETS[a], EMBEDDING[a], "lm_head"], **CAUSAL)),
}  # fmt: skip


def resized(base: Path, tokens: int) -> PreTrainedModel:
    """The base with rows for so many tokens, those that are added always the same."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if tokens != VOCABULARY:
        torch.manual_seed(1)
        model.resize_token_embeddings(tokens, mean_resizing=False)
    return model


def prompt(name: str) -> list[int]:
    """With every token that was added."""
    tokens, _ = ADAPTERS.get(name, (VOCABULARY, None))
    own = [(17 * i + len(name)) % min(tokens, 250) for i in range(14)]
    return own + list(range(VOCABULARY, tokens))


@dataclass(frozen=True)
class Case:
    """One architecture: our engine, PEFT's answers, and PEFT's folders."""

    engine: Engine
    exact: dict[str, Reference]
    store: Path


def train(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.15)
            elif parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape), alpha=0.15)


@pytest.fixture(scope="module")
def case(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Case]:
    @functools.cache
    def get(architecture: str) -> Case:
        base, store = tiny_model(architecture), tmp_path_factory.mktemp("store")
        exact = {"base": generate(resized(base, VOCABULARY).eval(), prompt("base"), STEPS)}
        for name, (tokens, config) in ADAPTERS.items():
            torch.manual_seed(len(name))
            trained = get_peft_model(resized(base, tokens), config(architecture))
            train(trained)
            trained.save_pretrained(
                store / name, **({"save_embedding_layers": True} if name == "copied" else {})
            )
            model = PeftModel.from_pretrained(resized(base, tokens), str(store / name)).eval()
            exact[name] = generate(model, prompt(name), STEPS)
            assert exact[name].logits.shape[-1] == tokens
        engine = make_engine(base, store)
        assert [i.problems for i in engine.adapters.registry.list() if i.problems] == []
        return Case(engine, exact, store)

    return get


@pytest.mark.parametrize("architecture", CONFIGS)
def test_everybody_gets_the_logits_of_the_tokens_that_it_knows(
    case: Callable[[str], Case], architecture: str
) -> None:
    this = case(architecture)
    names = list(this.exact)
    requests = [greedy(name, prompt(name), None if name == "base" else name, STEPS) for name in names]
    assert run_greedy(this.engine, requests) == [this.exact[name].tokens for name in names]
    for name in names:
        expected = this.exact[name]
        rows = [(prompt(name) + expected.tokens[:k], None if name == "base" else name) for k in range(STEPS)]
        logits = forced_logits(this.engine, rows)
        assert logits.shape == expected.logits.shape
        assert (logits - expected.logits).abs().max() < TOLERANCE


def test_only_rows_that_differ_are_kept(case: Callable[[str], Case]) -> None:
    rows = {info.name: info.compiled_bytes for info in case("llama").engine.adapters.registry.list()}
    registry = case("llama").engine.adapters.registry
    added = NEW - VOCABULARY
    (own,) = registry.compiled("grown-plain").token_rows
    assert own.modules == ("model.embed_tokens", "lm_head")
    assert own.weight.shape == (added, 64)
    assert registry.compiled("copied").token_rows == ()
    assert registry.compiled("grown-plain").vocabulary == NEW
    assert rows["grown-plain"] < rows["grown-tokens"] < rows["grown-saved"]


def test_a_copy_that_is_not_the_bases_own_is_refused(
    case: Callable[[str], Case], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in ("copied", "grown-plain"):
        folder = tmp_path / name
        folder.mkdir()
        original = case("llama").store / name
        (folder / "adapter_config.json").write_bytes((original / "adapter_config.json").read_bytes())
        tensors = load_file(original / "adapter_model.safetensors")
        for key in tensors:
            if key.endswith(".weight") and len(tensors[key]) >= VOCABULARY and "lora" not in key:
                tensors[key][7, 3] += 0.01
        save_file(tensors, folder / "adapter_model.safetensors")
    engine = make_engine(tiny_model("llama"), tmp_path)
    for info in engine.adapters.registry.list():
        (problem,) = info.problems
        assert problem.startswith(
            "it carries a copy of model.embed_tokens, of which 1 of 288 rows aren't the base's"
        )


def refs(name: str | None) -> tuple[AdapterRef, ...]:
    return () if name is None else (AdapterRef(name),)


def ask(id: str, name: str | None, **more: object) -> Request:
    """A request for as many tokens as the others, unless `more` says otherwise."""
    fields: dict[str, object] = {"stopping": StoppingParams(max_new_tokens=STEPS, ignore_eos=True), **more}
    return Request(id, tuple(prompt(name or "base")), refs(name), **fields)  # type: ignore[arg-type]  # the caller's


def refused_field(engine: Engine, request: Request | ScoreRequest) -> str:
    """The field that a request is refused for, "" if it isn't."""
    try:
        if isinstance(request, ScoreRequest):
            engine.intake.prepare_score(request).stack.release()
        else:
            engine.intake.prepare(request).stack.release()
    except InvalidRequest as error:
        return error.field
    return ""


@pytest.mark.parametrize(
    ("token", "knowing", "ignorant"),
    [(NEW - 1, "grown-saved", None), (VOCABULARY - 1, None, "shrunk-saved")],
)
def test_ids_are_checked_against_the_adapters_own_tokens(
    case: Callable[[str], Case], token: int, knowing: str | None, ignorant: str | None
) -> None:
    engine = case("llama").engine
    biased, stops = SamplingParams(logit_bias=((token, 5.0),)), StoppingParams(stop_token_ids=(token,))
    for name, known in ((knowing, True), (ignorant, False)):
        score = ScoreRequest("s", (1, 2), ((3, token),), refs(name))
        fields = {
            f"sampling.logit_bias[{token}]": ask("r", name, sampling=biased),
            "stopping.stop_token_ids[0]": ask("r", name, stopping=stops),
            "continuation_token_ids[0].ids[1]": score,
            "token_ids.ids[0]": Request("r", (token,), refs(name)),
        }
        for field, request in fields.items():
            assert refused_field(engine, request) == ("" if known else field)


def test_added_tokens_are_sampled_scored_and_penalised_like_any_other(case: Callable[[str], Case]) -> None:
    engine = case("llama").engine
    added = NEW - 1
    wanted = SamplingParams(logit_bias=((added, 100.0),), repetition_penalty=1.1, presence_penalty=0.5)
    flat = SamplingParams(temperature=100.0, seed=3)
    mine, theirs, [scored] = engine.generate(
        [
            ask("a", "grown-tokens", sampling=wanted, response=ResponseParams(top_logprobs=3)),
            ask("b", None, sampling=flat, response=ResponseParams(top_logprobs=20)),
            ScoreRequest("s", tuple(prompt("grown-tokens")), ((added, 5), (5,)), refs("grown-tokens")),
        ]
    )
    assert [token for output in mine for token in output.token_ids] == [added] * STEPS
    logits = forced_logits(engine, [(prompt("grown-tokens"), "grown-tokens")])[0]
    for one in (mine[0].logprobs[0], scored.scores[0].tokens[0]):
        assert one.logprob == pytest.approx(float(logits.log_softmax(-1)[added]), abs=1e-4)
    # A neighbour knows none of them, however flat its distribution is made.
    assert all(token < VOCABULARY for output in theirs for token in output.token_ids)
    assert all(top.token_id < VOCABULARY for o in theirs for one in o.logprobs for top in one.top)


def test_nothing_acts_beside_rows_of_its_own(case: Callable[[str], Case]) -> None:
    engine = case("llama").engine
    for name in ("grown-saved", "shrunk-embedding", "tokens"):
        both = Request("r", (1,), (AdapterRef("copied"), AdapterRef(name)))
        assert refused_field(engine, both) == "adapters[1]"


@pytest.mark.parametrize("precision", ["bfloat16", "nf4"])
def test_other_precisions_are_as_near_as_peft(
    case: Callable[[str], Case], tiny_model: Callable[[str], Path], precision: str
) -> None:
    this, base = case("llama"), tiny_model("llama")
    engine = make_engine(base, this.store, precision=precision)
    assert [i.problems for i in engine.adapters.registry.list() if i.problems] == []
    for name, (tokens, _) in ADAPTERS.items():
        exact = this.exact[name]
        model = load_reference(base, None, precision)
        if tokens != VOCABULARY:
            # Added rows are the same in every precision but for their rounding.
            model.resize_token_embeddings(tokens, mean_resizing=False)
            rows = resized(base, tokens).get_input_embeddings().weight
            with torch.no_grad():
                model.get_input_embeddings().weight.copy_(rows)
        model = PeftModel.from_pretrained(model, str(this.store / name)).eval()
        theirs = forced(model, prompt(name), exact.tokens) - exact.logits
        rows_of = [(prompt(name) + exact.tokens[:k], name) for k in range(STEPS)]
        ours = forced_logits(engine, rows_of) - exact.logits
        assert ours.square().mean().sqrt() <= 1.5 * theirs.square().mean().sqrt(), name
