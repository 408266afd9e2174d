"""LoRA on experts and their routers (`target_parameters`) by the rules of the matrix, on three shapes: Mixtral,
Qwen3-MoE with a layer without experts, and GPT-OSS, whose weights lie transposed and have biases.

Each row alone and in one batch with the others, with plain LoRA, a prefix and the base; through the C++
operators and torch's, merged, and with several adapters in a request.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig
from safetensors.torch import save_file

from polygraft.errors import AdapterUnavailable, InvalidRequest
from polygraft.layers.experts import sites
from polygraft.layers.experts.forward import experts_forward
from polygraft_types.adapters import AdapterState
from polygraft_types.requests import AdapterRef, CombinationType, LoraPath, Request, StoppingParams
from tests.architectures import EXPERTS, MATRIX, SMOKE, WINDOW
from tests.engines import forced_logits, greedy, make_engine, merged_logits, run_greedy
from tests.equivalence.cases import (
    ALLOWANCE,
    BASE,
    TOLERANCE,
    Answers,
    Case,
    check_as_near_as_peft,
    check_exact,
    check_rows_differ,
    make_case,
    random_answers,
    rms,
)
from tests.equivalence.reference import generate, load_reference
from tests.peft_folders import CAUSAL, save_adapter
from tests.tiny import save_random_model

ARCHITECTURES = ["mixtral", "qwen3_moe", "gpt_oss"]
ROUTER = {"mixtral": "mlp.gate.weight", "qwen3_moe": "mlp.gate.weight", "gpt_oss": "router.weight"}
UP, DOWN = "mlp.experts.gate_up_proj", "experts.down_proj"
STEPS = 4


def configs(architecture: str) -> dict[str, PeftConfig]:
    """One adapter for each row but the base's."""
    return {
        "experts": LoraConfig(
            r=3,
            lora_alpha=7,
            target_modules=["q_proj", "o_proj"],
            target_parameters=[DOWN, UP],
            rank_pattern={DOWN: 5, r"1\.self_attn\.q_proj": 2},
            alpha_pattern={UP: 9},
            **CAUSAL,
        ),
        "up": LoraConfig(r=4, use_rslora=True, target_modules=[], target_parameters=[UP], **CAUSAL),
        "down": LoraConfig(r=2, target_modules=[], target_parameters=["down_proj"], **CAUSAL),
        "one-layer": LoraConfig(
            r=2,
            target_modules=[],
            target_parameters=[f"model.layers.0.{UP}"],
            init_lora_weights=False,
            **CAUSAL,
        ),
        # Not "router": PEFT would take its own modules of that name for targets.
        "routing": LoraConfig(
            r=2, target_modules=["v_proj"], target_parameters=[ROUTER[architecture]], **CAUSAL
        ),
        # Of Mixtral and Qwen3-MoE PEFT makes experts' parameters and the router's of this; GPT-OSS has
        # attention alone.
        "all-linear": LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", **CAUSAL),
        "lora": LoraConfig(r=3, target_modules=["q_proj", "v_proj"], **CAUSAL),
        "prefix": PrefixTuningConfig(num_virtual_tokens=WINDOW + 3, **CAUSAL),
    }


ROWS = [BASE, *configs("mixtral")]
MERGEABLE = [row for row in ROWS if row not in (BASE, "prefix")]


def prompt(row: str) -> list[int]:
    at = ROWS.index(row)
    generator = torch.Generator().manual_seed(at)
    return torch.randint(0, 250, (5 + 7 * at % 24,), generator=generator).tolist()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Answers]:
    @functools.cache
    def get(architecture: str, all_experts: bool) -> Answers:
        chosen = {"num_experts_per_tok": EXPERTS} if all_experts else {}
        config = {**MATRIX[architecture].config, **chosen}
        prompts = {row: prompt(row) for row in ROWS}
        folder = tmp_path_factory.mktemp(architecture)
        return random_answers(folder, architecture, config, configs(architecture), prompts, STEPS)

    return get


@pytest.fixture(scope="module")
def case(answers: Callable[[str, bool], Answers]) -> Callable[[str, str], Case]:
    # As in test_architectures.py: coarser precisions choose all experts, float32 two of four.
    return functools.cache(
        lambda architecture, precision: make_case(answers(architecture, precision != "float32"), precision)
    )


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_gives_the_same_tokens(case: Callable[[str, str], Case], architecture: str, row: str) -> None:
    check_exact(case(architecture, "float32"), row)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_adapter_differs_from_the_base_and_from_every_other(
    case: Callable[[str, str], Case], architecture: str
) -> None:
    check_rows_differ(case(architecture, "float32"))


@pytest.mark.parametrize(
    "architecture",
    ["qwen2_moe", *(pytest.param(name, marks=pytest.mark.full) for name in ("olmoe", "deepseek_v3"))],
)
def test_other_architectures(tmp_path: Path, architecture: str) -> None:
    """With an expert that all rows share, with clipped attention, with experts in groups."""
    model = save_random_model(
        tmp_path / "model", architecture, dict(SMOKE[architecture].config), vectors=True
    )
    some: dict[str, PeftConfig] = {
        "experts": LoraConfig(
            r=3, target_modules=["o_proj"], target_parameters=[DOWN, UP], rank_pattern={DOWN: 5}, **CAUSAL
        ),
        "routing": LoraConfig(r=2, target_modules=[], target_parameters=["mlp.gate.weight"], **CAUSAL),
        "all-linear": LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", **CAUSAL),
    }
    for seed, (row, config) in enumerate(some.items()):
        save_adapter(tmp_path / "store" / row, model, architecture, config, seed)
    prompts = {row: prompt("experts") for row in (BASE, *some)}
    this = make_case(Answers(model, tmp_path / "store", prompts, STEPS), "float32")
    for row in prompts:
        check_exact(this, row)
    check_rows_differ(this)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_is_as_near_as_peft(case: Callable[[str, str], Case], architecture: str, row: str) -> None:
    check_as_near_as_peft(case(architecture, "bfloat16"), row)


@pytest.mark.parametrize(
    ("architecture", "precision"),
    [("mixtral", "int8"), ("gpt_oss", "nf4"), pytest.param("qwen3_moe", "int8", marks=pytest.mark.full)],
)
def test_beside_quantized_modules_it_is_as_near_as_peft(
    case: Callable[[str, str], Case], architecture: str, precision: str
) -> None:
    this = case(architecture, precision)
    for row in ("experts", "routing", "down"):
        check_as_near_as_peft(this, row)
    # A copy of experts' weights is rounded as PEFT rounds them.
    exact = this.exact["down"].logits[0]
    theirs = rms(this.peers("down")[0] - exact)
    assert rms(merged_logits(this.engine, prompt("down"), "down") - exact) <= ALLOWANCE * theirs


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_operators_in_torch_do_the_same(
    case: Callable[[str, str], Case], answers: Callable[[str, bool], Answers], architecture: str
) -> None:
    this, files = case(architecture, "float32"), answers(architecture, False)
    engine = make_engine(files.model, files.store, native=False)
    torch_case = Case(engine, this.prompts, this.exact, this.peers)
    for row in ROWS:
        check_exact(torch_case, row)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_neighbours_and_no_order_change_a_row(case: Callable[[str, str], Case], architecture: str) -> None:
    this = case(architecture, "float32")
    steps = [(row, at) for row in ROWS for at in range(STEPS)]

    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.sampled_from(steps), min_size=1, max_size=24))
    def check(batch: list[tuple[str, int]]) -> None:
        logits = forced_logits(this.engine, [this.step_of(row, at) for row, at in batch])
        expected = torch.stack([this.exact[row].logits[at] for row, at in batch])
        assert (logits - expected).abs().max() < TOLERANCE

    check()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_chunks_and_preemption_change_nothing(
    case: Callable[[str, str], Case], answers: Callable[[str, bool], Answers], architecture: str
) -> None:
    this, files = case(architecture, "float32"), answers(architecture, False)
    crowded = make_engine(
        files.model, files.store, kv_cache_bytes=60_000, max_num_seqs=5, max_num_batched_tokens=9
    )
    requests = [greedy(row, prompt(row), None if row == BASE else row, STEPS) for row in ROWS]
    assert run_greedy(crowded, requests) == [this.exact[row].tokens for row in ROWS]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_copies(case: Callable[[str, str], Case], architecture: str) -> None:
    this = case(architecture, "float32")
    before = {name: weight.clone() for name, weight in this.engine.base.model.named_parameters()}
    for row in MERGEABLE:
        logits = merged_logits(this.engine, prompt(row), row)
        assert (logits - this.exact[row].logits[0]).abs().max() < TOLERANCE
        copy = this.engine.copies.peek(this.engine.adapters.registry.current(row))
        assert copy is not None
        assert 0 < copy.bytes <= this.engine.copies.bytes_for(copy.adapter)
    # The base's own weights are back in use, bit for bit.
    [base] = forced_logits(this.engine, [(prompt(BASE), None)])
    assert (base - this.exact[BASE].logits[0]).abs().max() < TOLERANCE
    after = dict(this.engine.base.model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_requests_take_turns_with_those_on_copies(case: Callable[[str, str], Case]) -> None:
    this = case("gpt_oss", "float32")
    requests = [
        Request(
            f"{row}-{path}",
            tuple(prompt(row)),
            (AdapterRef(row),),
            path,
            path_required=True,
            stopping=StoppingParams(max_new_tokens=STEPS, ignore_eos=True),
        )
        for row in MERGEABLE
        for path in (LoraPath.MERGED, LoraPath.UNMERGED)
    ]
    expected = [this.exact[row].tokens for row in MERGEABLE for _ in range(2)]
    assert run_greedy(this.engine, requests) == expected


def test_a_copy_that_doesnt_fit_is_refused(answers: Callable[[str, bool], Answers]) -> None:
    files = answers("mixtral", False)
    # Of both layers' down projections: 4 experts of 64 times 128 float32 each.
    size = 2 * 4 * 64 * 128 * 4
    assert _copy_refusal(files, size) is None
    assert (
        _copy_refusal(files, size - 1)
        == f"a merged copy takes {size} bytes, --merged-bytes allows {size - 1}"
    )


def _copy_refusal(files: Answers, budget: int) -> str | None:
    engine = make_engine(files.model, files.store, merged_bytes=budget)
    try:
        engine.copies.check(engine.adapters.registry.current("down"))
    except AdapterUnavailable as error:
        return str(error).partition(": ")[2]
    return None


def stacked(model: torch.nn.Module, store: Path, *names: str) -> torch.nn.Module:
    """PEFT's own `set_adapter([...])`."""
    peft = PeftModel.from_pretrained(model, str(store / names[0]), adapter_name=names[0])
    for name in names[1:]:
        peft.load_adapter(str(store / name), name)
    peft.base_model.set_adapter(list(names))
    return peft.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_several_adapters_in_a_request(
    answers: Callable[[str, bool], Answers], tmp_path: Path, architecture: str
) -> None:
    files = answers(architecture, False)
    store = tmp_path / "store"
    shutil.copytree(files.store, store)
    # PEFT takes several on the same parameters alone.
    again = configs(architecture)["experts"]
    save_adapter(store / "again", files.model, architecture, again, seed=77)
    again_routing = configs(architecture)["routing"]
    save_adapter(store / "again-routing", files.model, architecture, again_routing, seed=78)
    # A weight is a factor on the scaling.
    half = json.loads((store / "again" / "adapter_config.json").read_text())
    half["lora_alpha"] /= 2
    half["alpha_pattern"] = {key: alpha / 2 for key, alpha in half["alpha_pattern"].items()}
    shutil.copytree(store / "again", store / "halved")
    (store / "halved" / "adapter_config.json").write_text(json.dumps(half))
    stacks: list[tuple[tuple[AdapterRef, ...], tuple[str, ...]]] = [
        ((AdapterRef("lora"), AdapterRef("experts")), ("lora", "experts")),
        ((AdapterRef("experts"), AdapterRef("again")), ("experts", "again")),
        ((AdapterRef("experts"), AdapterRef("again", weight=0.5)), ("experts", "halved")),
        ((AdapterRef("routing"), AdapterRef("again-routing")), ("routing", "again-routing")),
    ]
    tokens = prompt("experts")
    engine = make_engine(files.model, store)
    asked: list[tuple[list[int], str | tuple[AdapterRef, ...] | None]] = [
        (tokens, refs) for refs, _ in stacks
    ]
    asked += [(tokens, "experts"), (tokens, None), (tokens, "up"), (tokens, (AdapterRef("up", weight=-0.5),))]
    logits = forced_logits(engine, asked)
    for mine, (_, names) in zip(logits, stacks, strict=False):
        model = stacked(load_reference(files.model, None, "float32"), store, *names)
        assert (mine - generate(model, tokens, 1).logits[0]).abs().max() < TOLERANCE, names
    # They all differ, so that none can have passed for another.
    distance = (logits[:, None] - logits[None]).abs().amax(-1).fill_diagonal_(torch.inf)
    assert distance.min() > 10 * TOLERANCE


def test_they_are_in_no_linear_combination(answers: Callable[[str, bool], Answers]) -> None:
    files = answers("mixtral", False)
    engine = make_engine(files.model, files.store)
    for name in ("experts", "routing", "down"):
        with pytest.raises(
            InvalidRequest, match=r"adapters\[0\]: .*: PEFT doesn't combine target_parameters"
        ):
            engine.intake.resolve((AdapterRef(name),), CombinationType.LINEAR)
    model = stacked(load_reference(files.model, None, "float32"), files.store, "experts")
    with pytest.raises(ValueError, match=r"add_weighted_adapter does not support targeting nn\.Parameter"):
        model.add_weighted_adapter(["experts"], [1.0], "linear", combination_type="linear")


def test_a_step_without_such_an_adapter_runs_what_it_ran_before(
    case: Callable[[str, str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = case("mixtral", "float32").engine
    calls: list[int] = []

    def counted(module: torch.nn.Module, x: torch.Tensor, *rest: object) -> torch.Tensor:
        calls.append(len(x))
        return experts_forward(module, x, *rest)

    monkeypatch.setattr(sites, "experts_forward", counted)
    others: list[tuple[list[int], str | None]] = [([1, 2, 3], None), ([4, 5], "lora"), ([6], "routing")]
    forced_logits(engine, others)
    assert calls == []
    # Only the layer that it is on.
    forced_logits(engine, [*others, ([7, 8], "one-layer")])
    assert calls == [8]


# Layers with experts, how transformers 4 called the module around them, and the parts of an expert.
OLD = {
    "mixtral": ((0, 1), "block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ((0,), "mlp", ("gate_proj", "up_proj", "down_proj")),
}


@pytest.mark.parametrize("architecture", OLD)
def test_what_docs_say_of_folders_with_a_lora_for_each_expert(
    answers: Callable[[str, bool], Answers], tmp_path: Path, architecture: str
) -> None:
    layers, block, parts = OLD[architecture]
    model = answers(architecture, False).model
    exact = load_reference(model, None, "float32")
    old, generator = tmp_path / "old", torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        experts = exact.model.layers[layer].mlp.experts
        middle, hidden = experts.gate_up_proj.shape[1] // 2, experts.gate_up_proj.shape[2]
        for expert in range(EXPERTS):
            for at, part in enumerate(parts):
                inputs, outputs = (middle, hidden) if at == 2 else (hidden, middle)
                a = 0.15 * torch.randn(2, inputs, generator=generator)
                b = 0.15 * torch.randn(outputs, 2, generator=generator)
                prefix = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{part}"
                tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
                into = experts.down_proj[expert] if at == 2 else experts.gate_up_proj[expert].chunk(2)[at]
                with torch.no_grad():
                    into += b @ a * 1.5
    old.mkdir()
    save_file(tensors, old / "adapter_model.safetensors")
    LoraConfig(r=2, lora_alpha=3, target_modules=list(parts), **CAUSAL).save_pretrained(str(old))
    PeftModel.from_pretrained(load_reference(model, None, "float32"), str(old)).save_pretrained(
        str(tmp_path / "store" / "new")
    )
    shutil.copytree(old, tmp_path / "store" / "old")
    engine = make_engine(model, tmp_path / "store")
    # As they are they're refused.
    assert engine.adapters.registry.get("old").state is AdapterState.FAILED
    assert any("lora_A" in problem for problem in engine.adapters.registry.get("old").problems)
    tokens = prompt("experts")
    [logits] = forced_logits(engine, [(tokens, "new")])
    assert (logits - generate(exact, tokens, 1).logits[0]).abs().max() < TOLERANCE
