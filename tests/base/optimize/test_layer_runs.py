"""Neighbouring decoder layers in one call give what each gives by itself, to the bit, or are left apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from polygraft.adapters.stack import Stack
from polygraft.base.loader import load_base
from polygraft.base.optimize.layer_runs import trial_step
from polygraft.config import ServerConfig
from polygraft.core.request import LoraPath, Request
from polygraft.engine import engine as engine_module
from polygraft.engine.engine import Engine
from polygraft.engine.schedule.sequence import CanarySequence
from polygraft.layers.decoder_layer import FusedDecoderLayer
from polygraft.layers.native.kernels import load_kernels
from tests.engines import greedy, make_engine
from tests.layers.residual.test_bottlenecks import adapters as bottlenecks
from tests.tiny import CONFIGS, save_random_model, save_tiny_model

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")
# Weights in some layers only, norms, tokens, and virtual tokens of both sorts among them.
ADAPTERS = [
    None, "lora", "lora-layers", "lora-saved-norms", "lora-tokens", "dora", "ia3", "prefix", "prompt", "lokr", "boft", None,
]  # fmt: skip
S, F = "sliding_attention", "full_attention"
MIXED = {"layer_types": [S, S, F, F, F, S], "num_hidden_layers": 6}


@pytest.fixture(params=[1, 3])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Positions of one kind in the first two and the last layer, of another in those between."""
    return save_tiny_model(tmp_path_factory.mktemp("gemma"), "gemma3_text", **MIXED)


def fused(engine: Engine) -> list[FusedDecoderLayer]:
    forwards = [vars(module).get("forward") for module in engine.base.model.modules()]
    return [forward for forward in forwards if isinstance(forward, FusedDecoderLayer)]


def runs(engine: Engine) -> list[int]:
    """How many layers each of those computes that aren't computed with another one before."""
    counts, at, layers = [], 0, fused(engine)
    while at < len(layers):
        counts.append(len(layers[at]._addresses) if layers[at].together else 1)
        at += counts[-1]
    return counts


def apart(engine: Engine) -> None:
    """Compute each layer by itself, as the modules' own code calls them."""
    engine.runner._step.joins = False


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
def test_a_run_gives_the_same_logits_as_its_layers(
    tiny_model: Callable[[str], Path],
    common_store: Callable[[str], Path],
    architecture: str,
    precision: str,
) -> None:
    engine = warm_engine(tiny_model(architecture), common_store(architecture), precision)
    assert runs(engine) == [3]
    together = all_logits(engine, mix())
    assert len(together) > 5
    apart(engine)
    assert runs(engine) == [1, 1, 1]
    assert equal(together, all_logits(engine, mix()))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_runs_end_where_positions_change(gemma: Path, precision: str) -> None:
    engine = make_engine(gemma, precision=precision, prefix_caching=False)
    assert runs(engine) == [2, 3, 1]
    requests = [greedy(str(n), list(range(5 + n, 40 + n)), None, 4) for n in range(3)]
    together = all_logits(engine, requests)
    apart(engine)
    assert equal(together, all_logits(engine, requests))


def test_bottlenecks_at_some_sites_and_couplings_act_within_a_run(llama: Path) -> None:
    engine = make_engine(llama, prefix_caching=False)
    assert runs(engine) == [3]
    stacks = [Stack()]
    for name, compiled in bottlenecks(engine).items():
        slot = engine.runner._bank.install(compiled)
        adapter = engine.adapters.registry.new_adapter(name, compiled.without_layer_weights(), slot)
        stacks.append(Stack.of(adapter))

    def logits() -> list[torch.Tensor]:
        sequences = [
            CanarySequence(str(at), list(range(5 + at, 30 + 2 * at)), stack)
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


def test_merged_weights_are_what_a_run_multiplies_by(llama: Path, llama_store: Path) -> None:
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


def test_a_layer_that_isnt_fused_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_model(tmp_path, "llama", num_hidden_layers=6)
    settings = {"kv_cache_bytes": 2**20, "prefix_caching": False}
    logits = []
    for patched in (False, True):
        base = load_base(str(model))
        doubled_mlp(base.model.model.layers[2])
        if patched:
            monkeypatch.setattr(engine_module, "fuse_decoder_layers", lambda *_: None)
        engine = Engine(base, ServerConfig(**settings))
        assert runs(engine) == ([] if patched else [2, 3])
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


class Halved(nn.Module):
    def forward(self, x: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return x / 2


def another_layer_between(engine: Engine) -> None:
    model = engine.base.model
    model.model.layers.insert(1, Halved())
    model.config.num_hidden_layers += 1


def the_last_layer_left_out(engine: Engine) -> None:
    engine.base.model.config.num_hidden_layers -= 1


def two_layers_exchanged(engine: Engine) -> None:
    layers = engine.base.model.model.layers
    layers[1], layers[2] = layers[2], layers[1]


def other_positions_behind_the_first(engine: Engine) -> None:
    class Turned(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor, **kwargs: object) -> torch.Tensor:
            cos, sin = kwargs.pop("position_embeddings")  # type: ignore[misc]
            return self.layer(x, position_embeddings=(sin.clone(), cos.clone()), **kwargs)

    layers = engine.base.model.model.layers
    layers[1] = Turned(layers[1])


@pytest.mark.parametrize(
    "change",
    [another_layer_between, the_last_layer_left_out, two_layers_exchanged, other_positions_behind_the_first],
)
def test_a_model_that_calls_its_layers_otherwise_is_computed_again_layer_by_layer(
    llama: Path, caplog: pytest.LogCaptureFixture, change: Callable[[Engine], None]
) -> None:
    engine, reference = make_engine(llama, prefix_caching=False), make_engine(llama, prefix_caching=False)
    before = all_logits(engine, mix()[:1])
    for one in (engine, reference):
        change(one)
        one.runner._frame = None  # so that the model's own code runs
    apart(reference)
    mine = all_logits(engine, mix()[:1])
    assert "no longer called one right after another" in caplog.text
    assert runs(engine) == [1, 1, 1]
    assert equal(mine, all_logits(reference, mix()[:1]))
    assert not equal(mine, before)


def test_hidden_states_between_layers_can_be_asked_for(engine: Engine) -> None:
    model, step = engine.base.model, engine.runner._step
    ids = torch.arange(5)[None]

    def hidden_states() -> tuple[torch.Tensor, ...]:
        with trial_step(step, fused(engine)[0].attention.key_cache):
            return model(  # type: ignore[no-any-return]
                input_ids=ids,
                position_ids=ids,
                attention_mask=torch.zeros(1, 1, 1, 1),
                use_cache=False,
                output_hidden_states=True,
            ).hidden_states

    mine = hidden_states()
    apart(engine)
    assert equal(list(mine), list(hidden_states()))
    assert len({float(x.norm()) for x in mine}) == len(mine) == 4


def test_a_layer_behind_the_first_computes_itself_alone(engine: Engine) -> None:
    layer = fused(engine)[1]
    x, cos, sin = (
        torch.randn(1, 5, width, generator=torch.Generator().manual_seed(width)) for width in (64, 16, 16)
    )
    outs = []
    for _ in range(2):
        with trial_step(engine.runner._step, layer.attention.key_cache):
            outs.append(layer(x, position_embeddings=(cos, sin)))
            assert engine.runner._step.following is None
        apart(engine)
    assert torch.equal(*outs)


def test_a_model_that_calls_a_layer_twice_has_no_runs(llama: Path) -> None:
    base = load_base(str(llama))
    layers = base.model.model.layers
    layers.append(layers[0])
    base.model.config.num_hidden_layers += 1
    engine = Engine(base, ServerConfig(kv_cache_bytes=2**20))
    assert len(fused(engine)) == 3
    assert runs(engine) == [1, 1, 1]


def test_a_run_that_gave_something_else_would_be_given_up(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = load_kernels()
    assert kernels is not None
    call = kernels.decoder_layers

    def wrong(*args: object) -> None:
        dtype, addresses, adapted, count, *rest = args
        call(dtype, addresses, adapted, min(int(count), 2), *rest)  # type: ignore[call-overload]

    monkeypatch.setattr(kernels, "decoder_layers", wrong)
    engine = make_engine(llama)
    assert len(fused(engine)) == 3
    assert runs(engine) == [1, 1, 1]


@pytest.mark.parametrize("architecture", ["mistral", "qwen3", "gemma2"])
def test_other_architectures_are_one_run(tmp_path: Path, architecture: str) -> None:
    model = save_random_model(tmp_path, architecture, {**CONFIGS["llama"], "head_dim": 16})
    engine = make_engine(model, prefix_caching=False)
    assert runs(engine) == [3]
    together = all_logits(engine, mix()[:1])
    apart(engine)
    assert equal(together, all_logits(engine, mix()[:1]))
