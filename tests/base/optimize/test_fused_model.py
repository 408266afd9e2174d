"""A model with all layers in one call gives its own logits, to the bit, or isn't taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from polygraft.adapters.stack import Stack
from polygraft.base.loader import load_base
from polygraft.config import ServerConfig
from polygraft.engine import engine as engine_module
from polygraft.engine.engine import Engine
from polygraft.engine.sequences.sequence import SmokeTestSequence
from polygraft.layers.native.kernels import load_kernels
from polygraft_types.requests import LoraPath, Request
from tests.architectures import MATRIX
from tests.base.optimize.test_layer_fusing import fused_layers
from tests.engines import greedy, make_engine
from tests.layers.residual.test_bottlenecks import adapters as bottlenecks
from tests.tiny import CONFIGS, save_random_model, save_tiny_model

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")
# Weights in some layers only, norms, tokens, and virtual tokens of both sorts among them.
ADAPTERS = [
    None, "lora", "lora-layers", "lora-saved-norms", "lora-tokens", "dora", "ia3", "prefix", "prompt", "lokr", "boft", None,
]  # fmt: skip


@pytest.fixture(params=[1, 3])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def is_fused(engine: Engine) -> bool:
    return engine.runner._fused_model is not None


def apart(engine: Engine) -> None:
    """Compute each layer by itself, as the modules' own code calls them."""
    engine.runner._fused_model = None


def all_logits(engine: Engine, requests: list[Request]) -> list[torch.Tensor]:
    """Of every step that the requests take."""
    seen: list[torch.Tensor] = []
    run = engine.runner.run
    engine.runner.run = lambda batch: seen.append(run(batch).clone()) or seen[-1].clone()  # type: ignore[method-assign]
    engine.generate(requests)
    del engine.runner.run
    return seen


def mix(name: str = "", **options: object) -> list[Request]:
    return [
        greedy(f"{name}{at}", list(range(10 + at, 31 + 2 * at)), adapter, 5, **options)
        for at, adapter in enumerate(ADAPTERS)
    ]


def warm_engine(model: Path, store: Path, precision: str) -> Engine:
    """One that has answered `mix` and takes several steps for its prompts."""
    engine = make_engine(model, store, precision=precision, prefix_caching=False, max_num_batched_tokens=128)
    engine.generate(mix("warm"))
    return engine


def equal(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "nf4"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_it_gives_the_same_logits_as_the_model(
    tiny_model: Callable[[str], Path],
    common_store: Callable[[str], Path],
    architecture: str,
    precision: str,
) -> None:
    engine = warm_engine(tiny_model(architecture), common_store(architecture), precision)
    assert is_fused(engine)
    assert len(fused_layers(engine.base.model)) == 3
    engine.base.model.register_forward_pre_hook(lambda *_: pytest.fail("the model's own code runs"))
    together = all_logits(engine, mix())
    assert len(together) > 5
    engine.base.model._forward_pre_hooks.clear()
    apart(engine)
    assert equal(together, all_logits(engine, mix()))


def test_bottlenecks_at_some_sites_and_couplings_act_within_it(llama: Path) -> None:
    engine = make_engine(llama, prefix_caching=False)
    assert is_fused(engine)
    stacks = [Stack()]
    for name, compiled in bottlenecks(engine).items():
        slot = engine.runner._bank.install(compiled)
        adapter = engine.adapters.registry.new_adapter(name, compiled.without_layer_weights(), slot)
        stacks.append(Stack.of(adapter))

    def logits() -> list[torch.Tensor]:
        sequences = [
            SmokeTestSequence(
                str(at), list(range(5 + at, 30 + 2 * at)), stack, engine.base.spec.vocabulary_size
            )
            for at, stack in enumerate(stacks)
        ]
        for sequence in sequences:
            sequence.stack.pin()
            engine.scheduler.add(sequence)
        while engine.scheduler.has_work:
            engine.step()
        return [sequence.logits for sequence in sequences if sequence.logits is not None]

    together = logits()
    assert len(together) == 4
    apart(engine)
    assert equal(together, logits())


def test_merged_weights_are_what_it_multiplies_by(llama: Path, llama_store: Path) -> None:
    engine = make_engine(llama, llama_store, prefix_caching=False, merged_bytes=2**24)
    requests = [
        Request(str(n), (*range(5 + n, 30),), r.adapters, stopping=r.stopping, lora_path=path)
        for n, (r, path) in enumerate(
            zip(
                [greedy("", [], "lora", 4), greedy("", [], "lora", 4), greedy("", [], None, 4)],
                [LoraPath.MERGED, LoraPath.UNMERGED, LoraPath.UNMERGED],
                strict=True,
            )
        )
    ]
    engine.generate(requests)
    together = all_logits(engine, requests)
    apart(engine)
    assert equal(together, all_logits(engine, requests))


def doubled_mlp(layer: nn.Module) -> None:
    forward = layer.mlp.forward
    layer.mlp.forward = lambda x: 2 * forward(x)


def test_a_layer_that_isnt_fused_leaves_the_others_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny_model(tmp_path, "llama", num_hidden_layers=6)
    settings = {"kv_cache_bytes": 2**20, "prefix_caching": False}
    logits = []
    for patched in (False, True):
        base = load_base(str(model))
        doubled_mlp(base.model.model.layers[2])
        if patched:
            monkeypatch.setattr(engine_module, "fuse_decoder_layers", lambda *_: None)
        engine = Engine(base, ServerConfig(**settings))
        assert not is_fused(engine)
        assert len(fused_layers(base.model)) == (0 if patched else 5)
        logits.append(all_logits(engine, mix()[:1]))
    assert equal(*logits)


@pytest.fixture
def engine(llama: Path) -> Engine:
    return make_engine(llama, prefix_caching=False)


def halve(module: nn.Module, args: object, out: torch.Tensor) -> torch.Tensor:
    return out / 2


def halve_input(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (args[0] / 2,)


def wrapped(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda x, **kwargs: forward(x, **kwargs) / 2


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_hook(halve),
        lambda layer: layer.register_forward_pre_hook(halve_input),
        wrapped,
    ],
    ids=["hook", "pre-hook", "wrapper"],
)
def test_whoever_comes_between_layers_later_is_heard(
    engine: Engine, change: Callable[[nn.Module], object], at: int
) -> None:
    before = all_logits(engine, mix()[:1])
    change(engine.base.model.model.layers[at])
    mine = all_logits(engine, mix()[:1])
    apart(engine)
    assert equal(mine, all_logits(engine, mix()[:1]))
    assert not equal(mine, before)


def test_a_model_that_calls_a_layer_twice_isnt_fused(llama: Path) -> None:
    base = load_base(str(llama))
    layers = base.model.model.layers
    layers.append(layers[0])
    base.model.config.num_hidden_layers += 1
    engine = Engine(base, ServerConfig(kv_cache_bytes=2**20))
    assert len(fused_layers(base.model)) == 3
    assert not is_fused(engine)


def test_one_that_gives_other_logits_isnt_taken(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = load_kernels()
    assert kernels is not None
    call = kernels.decoder_layers

    def wrong(*args: object) -> None:
        dtype, addresses, adapted, count, *rest = args
        call(dtype, addresses, adapted, min(int(count), 2), *rest)  # type: ignore[call-overload]

    monkeypatch.setattr(kernels, "decoder_layers", wrong)
    engine = make_engine(llama)
    assert len(fused_layers(engine.base.model)) == 3
    assert not is_fused(engine)


@pytest.mark.parametrize("architecture", ["mistral", "qwen3"])
def test_other_architectures_are_fused(tmp_path: Path, architecture: str) -> None:
    model = save_random_model(tmp_path, architecture, {**CONFIGS["llama"], "head_dim": 16})
    engine = make_engine(model, prefix_caching=False)
    assert is_fused(engine)
    together = all_logits(engine, mix()[:1])
    apart(engine)
    assert equal(together, all_logits(engine, mix()[:1]))


@pytest.mark.parametrize(
    ("architecture", "whole"),
    [("mistral", True), ("qwen3", True), ("gemma2", False), ("phi3", False), ("gpt_oss", False)],
)
def test_what_a_model_does_besides_keeps_its_own_code(tmp_path: Path, architecture: str, whole: bool) -> None:
    # Gemma 2 caps its logits; Phi 3 and gpt-oss have layers of other makes.
    engine = make_engine(save_random_model(tmp_path, architecture, MATRIX[architecture].config))
    assert is_fused(engine) == whole


def test_layers_with_other_positions_stay_apart(tiny_model: Callable[[str], Path]) -> None:
    engine = make_engine(tiny_model("gemma3_text"))
    assert len(fused_layers(engine.base.model)) == 4
    assert not is_fused(engine)


def scaled_logits(model: PreTrainedModel) -> None:
    forward = model.forward

    def run(**kwargs: object) -> object:
        out = forward(**kwargs)
        out.logits = out.logits / 2
        return out

    model.forward = run


def doubled_logits_in_place(model: PreTrainedModel) -> None:
    forward = model.forward

    def run(**kwargs: object) -> object:
        out = forward(**kwargs)
        out.logits *= 2
        return out

    model.forward = run


def scaled_embeddings(model: PreTrainedModel) -> None:
    forward = model.model.forward

    def run(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, **kwargs: object) -> object:
        x = model.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return forward(inputs_embeds=2 * x, **kwargs)

    model.model.forward = run


def scaled_states(model: PreTrainedModel) -> None:
    forward = model.model.forward

    def run(**kwargs: object) -> object:
        out = forward(**kwargs)
        out.last_hidden_state = out.last_hidden_state / 2
        return out

    model.model.forward = run


def later_positions(model: PreTrainedModel) -> None:
    forward = model.model.forward
    model.model.forward = lambda position_ids, **kwargs: forward(position_ids=position_ids + 1, **kwargs)


@pytest.mark.parametrize(
    "change",
    [scaled_logits, doubled_logits_in_place, scaled_embeddings, scaled_states, later_positions],
)
def test_a_model_that_does_something_between_its_parts_has_none(
    llama: Path, change: Callable[[PreTrainedModel], None]
) -> None:
    base = load_base(str(llama))
    change(base.model)
    engine = Engine(base, ServerConfig(kv_cache_bytes=2**20))
    assert len(fused_layers(base.model)) == 3
    assert not is_fused(engine)


@pytest.mark.parametrize("part", ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"])
def test_hooks_on_its_parts_are_called(llama: Path, part: str) -> None:
    engine = make_engine(llama, prefix_caching=False)
    before = all_logits(engine, mix()[:1])

    def halve(module: nn.Module, args: object, out: Any) -> object:
        return tuple(x / 2 for x in out) if isinstance(out, tuple) else out / 2

    engine.base.model.get_submodule(part).register_forward_hook(halve)
    together = all_logits(engine, mix()[:1])
    assert not equal(together, before)
    apart(engine)
    assert equal(together, all_logits(engine, mix()[:1]))
