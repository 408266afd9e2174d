"""Several adapters in one request equal what PEFT makes of them, among rows that have others.

PEFT combines adapters of one kind itself (`set_adapter([...])`, `add_weighted_adapter`) and some of different
kinds (`PeftMixedModel`). Where it doesn't, the reference is made of its pieces: what is merged into the base
stands for an adapter named earlier.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel
from peft.tuners.lokr import LoKrLayer

from polygraft.engine.engine import Engine
from polygraft_types.requests import AdapterRef, CombinationType, Request, StoppingParams
from tests.engines import forced_logits, make_engine, run_greedy
from tests.equivalence.reference import Reference, forced, generate, load_reference
from tests.peft_folders import KINDS, TARGETS, save_adapter
from tests.tiny import CONFIGS

STEPS = 6
TOLERANCE = 1e-4
Build = Callable[[torch.nn.Module, Path], torch.nn.Module]


def together(*names: str) -> Build:
    """PEFT's own `set_adapter([...])`."""

    def build(base: torch.nn.Module, store: Path) -> torch.nn.Module:
        model = PeftModel.from_pretrained(base, str(store / names[0]), adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(str(store / name), name)
        model.base_model.set_adapter(list(names))
        return model

    return build


def weighted(combination_type: str = "cat", /, **weights: float) -> Build:
    """PEFT's own `add_weighted_adapter`."""

    def build(base: torch.nn.Module, store: Path) -> torch.nn.Module:
        names = [name.replace("_", "-") for name in weights]
        model = together(*names)(base, store)
        model.add_weighted_adapter(names, list(weights.values()), "all", combination_type=combination_type)
        model.set_adapter("all")
        return model

    return build


def mixed(*names: str) -> Build:
    """PEFT's own adapters of several kinds."""

    def build(base: torch.nn.Module, store: Path) -> torch.nn.Module:
        model = PeftMixedModel.from_pretrained(base, str(store / names[0]), adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(str(store / name), name)
        model.set_adapter(list(names))
        return model

    return build


def after(first: Build, name: str) -> Build:
    """An adapter over a model that has others merged into it."""

    def build(base: torch.nn.Module, store: Path) -> torch.nn.Module:
        return PeftModel.from_pretrained(first(base, store).merge_and_unload(), str(store / name))

    return build


def over(first: Build, name: str) -> Build:
    """An adapter over a model that has others beside its weights: a tied head can't have them merged."""

    def build(base: torch.nn.Module, store: Path) -> torch.nn.Module:
        model = first(base, store).base_model.model
        del model.peft_config
        return PeftModel.from_pretrained(model, str(store / name))

    return build


def half_lokr(whole: Build) -> Build:
    """With half of what LoKr adds."""

    def build(base: torch.nn.Module, store: Path) -> torch.nn.Module:
        model = whole(base, store)
        for module in model.modules():
            if isinstance(module, LoKrLayer):
                module.scaling["lokr"] *= 0.5
        return model

    return build


@dataclass(frozen=True)
class Case:
    """Adapters with their weights, and what PEFT makes of them."""

    members: tuple[str | tuple[str, float], ...]
    build: Build
    combination_type: CombinationType = CombinationType.STACK

    @property
    def refs(self) -> tuple[AdapterRef, ...]:
        return tuple(
            AdapterRef(member) if isinstance(member, str) else AdapterRef(member[0], weight=member[1])
            for member in self.members
        )


def linear(**weights: float) -> Case:
    """A linear combination, by PEFT's own `add_weighted_adapter`."""
    members = tuple((name.replace("_", "-"), weight) for name, weight in weights.items())
    return Case(members, weighted("linear", **weights), CombinationType.LINEAR)


one = together
# Modules whose outputs (IA)^3 scales, and not those whose inputs it does.
ATTENTION = {
    "llama": ["k_proj"],
    "qwen2": ["k_proj", "v_proj"],
    "gemma3_text": ["q_proj"],
    "gpt2": ["c_attn"],
}

CASES = {
    "two": Case(("lora", "lora-regex"), together("lora", "lora-regex")),
    "the other way round": Case(("lora-regex", "lora"), together("lora-regex", "lora")),
    "three with biases and patterns": Case(
        ("lora-bias", "rslora-patterns", "lora-all-linear"),
        together("lora-bias", "rslora-patterns", "lora-all-linear"),
    ),
    "weighted": Case((("lora", 0.5), ("lora-layers", -1.25)), weighted(lora=0.5, lora_layers=-1.25)),
    "weighted with a head": Case(
        (("lora-head", 2.0), ("lora", 0.0), ("lora-layers", 0.75)),
        weighted(lora_head=2.0, lora=0.0, lora_layers=0.75),
    ),
    "one, weighted": Case((("lora", 0.3),), weighted(lora=0.3)),
    "DoRA first": Case(("dora", "lora"), together("dora", "lora")),
    "DoRA last": Case(("lora-all-linear", "dora"), together("lora-all-linear", "dora")),
    "several kinds": Case(("loha", "lora"), mixed("loha", "lora")),
    "more kinds": Case(("adalora", "vera", "lora"), after(after(one("adalora"), "vera"), "lora")),
    "prompt": Case(("lora-all-linear", "prompt"), after(one("lora-all-linear"), "prompt")),
    "prompt named first": Case(("p-tuning", "lora-all-linear"), after(one("lora-all-linear"), "p-tuning")),
    "prompt, weighted": Case(
        (("lora", 0.5), "prompt", ("lora-layers", -1.25)),
        after(weighted(lora=0.5, lora_layers=-1.25), "prompt"),
    ),
    "prefix": Case(("lora-all-linear", "prefix"), after(one("lora-all-linear"), "prefix")),
    "prefix and another": Case(("prefix", "lora"), after(one("lora"), "prefix")),
    "cartridge": Case(("cartridge", "dora"), after(one("dora"), "cartridge")),
    "factors, then LoRA": Case(("ia3", "lora"), after(one("ia3"), "lora")),
    "LoRA, then factors": Case(("lora-attention", "ia3"), after(one("lora-attention"), "ia3")),
    "factors, LoRA and a prompt": Case(("ia3", "lora", "prompt"), after(after(one("ia3"), "lora"), "prompt")),
    "Kronecker products, weighted": Case((("lokr", 0.5), "lora"), half_lokr(over(one("lokr"), "lora"))),
    "rotation, then LoRA": Case(("oft", "lora"), over(one("oft"), "lora")),
    "two rotations": Case(("oft", "oft-constrained"), together("oft", "oft-constrained")),
    "rotation and factors, then LoRA": Case(("boft", "lora"), over(one("boft"), "lora")),
    "reflections, then LoRA": Case(("hra", "lora"), over(one("hra"), "lora")),
    "projection, then LoRA": Case(("deft", "lora"), over(one("deft"), "lora")),
    "rotation and a prompt": Case(("prompt", "oft"), over(one("oft"), "prompt")),
    "factors twice": Case(("ia3", "ia3-more"), together("ia3", "ia3-more")),
    "linear": linear(lora=0.5, lora_layers=0.75),
    "linear with a negative weight": linear(lora=-1.25, lora_layers=0.5),
    "linear of three, on embedding and head": linear(lora_embedding=0.75, lora_head=0.5, lora=-0.25),
    "linear with patterns": linear(lora_patterns=0.5, rslora_patterns=0.5),
    "linear, rsLoRA first": linear(rslora_patterns=0.25, lora_patterns=-0.5),
    "linear of one": linear(rslora_patterns=0.5),
    "linear by regular expressions": linear(lora_regex=0.5, lora_regex_more=0.75),
}

ALONE = ("lora", "dora", "ia3", "prompt", "prefix")
"""Rows beside them, of adapters that are in some of them."""


@dataclass(frozen=True)
class Row:
    """A request, and the reference's answer to it."""

    prompt: list[int]
    refs: tuple[AdapterRef, ...]
    expected: Reference
    combination_type: CombinationType = CombinationType.STACK


@dataclass(frozen=True)
class Served:
    """One architecture: the engine, all rows, and what comes of them in the same steps."""

    engine: Engine
    rows: dict[str, Row]

    def request(self, name: str) -> Request:
        row = self.rows[name]
        stopping = StoppingParams(max_new_tokens=STEPS, ignore_eos=True)
        return Request(
            name, tuple(row.prompt), row.refs, stopping=stopping, combination_type=row.combination_type
        )

    def forced(self, *names: str) -> torch.Tensor:
        """Logits [rows, STEPS, vocabulary] along the references' tokens, all in the same steps."""
        rows = [self.rows[name] for name in names]
        asked = [(row.prompt + row.expected.tokens[:k], row.refs) for row in rows for k in range(STEPS)]
        combined = [row.combination_type for row in rows for _ in range(STEPS)]
        return forced_logits(self.engine, asked, combined).view(len(rows), STEPS, -1)

    @functools.cached_property
    def mixed_tokens(self) -> dict[str, list[int]]:
        answers = run_greedy(self.engine, [self.request(name) for name in self.rows])
        return dict(zip(self.rows, answers, strict=True))

    @functools.cached_property
    def mixed_logits(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.rows, self.forced(*self.rows), strict=True))


def random_prompt(at: int) -> list[int]:
    generator = torch.Generator().manual_seed(at)
    return torch.randint(0, 250, (2 + 9 * at % 41,), generator=generator).tolist()


@pytest.fixture(scope="module")
def served(
    tiny_model: Callable[[str], Path],
    adapter_store: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, bool], Served]:
    @functools.cache
    def store_of(architecture: str) -> Path:
        store = tmp_path_factory.mktemp(f"{architecture}-stacks")
        names = {ref.name for case in CASES.values() for ref in case.refs}
        for name in sorted(names.intersection(KINDS)):
            shutil.copytree(adapter_store(architecture) / name, store / name)
        model = tiny_model(architecture)
        save_adapter(store / "ia3-more", model, architecture, "ia3", seed=98)
        narrow = LoraConfig(r=3, target_modules=ATTENTION[architecture], task_type="CAUSAL_LM")
        save_adapter(store / "lora-attention", model, architecture, narrow, seed=99)
        targets = TARGETS[architecture]
        patterns = LoraConfig(
            r=4,
            lora_alpha=-3,
            target_modules=targets,
            rank_pattern={targets[0]: 2, r"1\..*" + targets[-1]: 7},
            alpha_pattern={targets[0]: 5},
            task_type="CAUSAL_LM",
        )
        save_adapter(store / "lora-patterns", model, architecture, patterns, seed=97)
        layer = "h" if architecture == "gpt2" else "layers"
        regex = LoraConfig(r=5, target_modules=rf".*{layer}\.1\..*_proj", task_type="CAUSAL_LM")
        save_adapter(store / "lora-regex-more", model, architecture, regex, seed=96)
        return store

    @functools.cache
    def rows_of(architecture: str) -> dict[str, Row]:
        model, store = tiny_model(architecture), store_of(architecture)
        rows = {}
        for at, (name, case) in enumerate(CASES.items()):
            reference = case.build(load_reference(model, None, "float32"), store).eval()
            expected = generate(reference, random_prompt(at), STEPS)
            rows[name] = Row(random_prompt(at), case.refs, expected, case.combination_type)
        for at, alone in enumerate((None, *ALONE)):
            reference = load_reference(model, None if alone is None else store / alone, "float32")
            refs = () if alone is None else (AdapterRef(alone),)
            rows[f"alone {alone}"] = Row(
                random_prompt(at), refs, generate(reference, random_prompt(at), STEPS)
            )
        return rows

    @functools.cache
    def get(architecture: str, native: bool = True) -> Served:
        engine = make_engine(tiny_model(architecture), store_of(architecture), native=native)
        assert [info.problems for info in engine.adapters.registry.list() if info.problems] == []
        return Served(engine, rows_of(architecture))

    return get


@pytest.mark.parametrize("name", [*CASES, "alone None", *(f"alone {name}" for name in ALONE)])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_stack_gives_the_references_tokens(
    served: Callable[[str], Served], architecture: str, name: str
) -> None:
    this = served(architecture)
    expected = this.rows[name].expected
    assert run_greedy(this.engine, [this.request(name)]) == [expected.tokens]
    assert this.mixed_tokens[name] == expected.tokens
    assert (this.mixed_logits[name] - expected.logits).abs().max() < TOLERANCE
    assert (this.forced(name)[0] - expected.logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_the_operators_in_torch_do_the_same(served: Callable[[str, bool], Served], architecture: str) -> None:
    this = served(architecture, False)
    for name, row in this.rows.items():
        assert this.mixed_tokens[name] == row.expected.tokens
        assert (this.mixed_logits[name] - row.expected.logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_member_and_its_weight_matters(served: Callable[[str], Served], architecture: str) -> None:
    this = served(architecture)
    for name, case in CASES.items():
        tokens, refs = this.rows[name].prompt, case.refs
        others = [tuple(ref for ref in refs if ref is not left) for left in refs if left.weight != 0]
        unweighted = tuple(AdapterRef(ref.name) for ref in refs)
        others += [unweighted] if unweighted != refs else []
        asked = [(these, case.combination_type) for these in (refs, *others)]
        if case.combination_type is CombinationType.LINEAR:
            asked.append((refs, CombinationType.STACK))
        whole, *rest = forced_logits(
            this.engine, [(tokens, these) for these, _ in asked], [combined for _, combined in asked]
        )
        for other, logits in zip(asked[1:], rest, strict=True):
            assert (whole - logits).abs().max() > 10 * TOLERANCE, (name, other)


def test_what_docs_say_of_other_combinations(llama: Path, llama_store: Path, tmp_path: Path) -> None:
    model = together("lora", "lora-layers")(load_reference(llama, None, "float32"), llama_store)
    model.add_weighted_adapter(
        ["lora", "lora-layers"], [0.5, 0.75], "ties", combination_type="ties", density=0.5
    )
    model.save_pretrained(str(tmp_path), selected_adapters=["ties"])
    model.set_adapter("ties")
    expected = generate(model.eval(), random_prompt(1), STEPS)
    engine = make_engine(llama, tmp_path)
    [logits] = forced_logits(engine, [(random_prompt(1), "ties")])
    assert (logits - expected.logits[0]).abs().max() < TOLERANCE
    cat = weighted(lora=0.5, lora_layers=0.75)(load_reference(llama, None, "float32"), llama_store)
    assert (logits - generate(cat.eval(), random_prompt(1), 1).logits[0]).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "name",
    [
        "two", "three with biases and patterns", "weighted", "factors twice", "linear", "linear, rsLoRA first",
        "linear of three, on embedding and head",
    ],
)  # fmt: skip
def test_bfloat16_is_as_near_as_peft(
    tiny_model: Callable[[str], Path], served: Callable[[str], Served], architecture: str, name: str
) -> None:
    this, model = served(architecture), tiny_model(architecture)
    row, store = this.rows[name], Path(str(this.engine.config.adapters))
    peft = CASES[name].build(load_reference(model, None, "bfloat16"), store).eval()
    theirs = forced(peft, row.prompt, row.expected.tokens) - row.expected.logits
    engine = make_engine(model, store, precision="bfloat16")
    ours = Served(engine, this.rows).mixed_logits[name] - row.expected.logits
    assert ours.square().mean().sqrt() <= 1.5 * theirs.square().mean().sqrt()
