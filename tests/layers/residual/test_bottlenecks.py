"""Bottlenecks and couplings: each option by its formula, in C++ and torch, in and out of a fused layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.activations import get_activation

from polygraft.adapters.stack import Stack, check_stack
from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.residual_primitives import Bottleneck, Coupling, CouplingLayers, NormAfter
from polygraft.engine.engine import Engine
from polygraft.engine.sequences.sequence import SmokeTestSequence
from polygraft.layers.decoder_layer import FusedDecoderLayer
from polygraft.layers.linear.low_rank_bank import LowRankBank
from polygraft.layers.native.kernels import DTYPES, load_kernels
from polygraft.layers.operators import TORCH
from polygraft.layers.residual.activations import ACTIVATIONS
from polygraft.layers.residual.bottlenecks import BottleneckSite
from polygraft.layers.residual.couplings import couple
from polygraft.layers.step import Segments, StepContext
from tests.engine.stores import copy_of
from tests.engines import make_engine
from tests.equivalence.reference import load_reference
from tests.tiny import CONFIGS

HIDDEN, ROWS = 50, 21
# Rows 0 to 2 have no adapter, 9 and 10 one without weights at the site.
RUNS = [(3, 9, 1), (9, 11, 2), (11, 21, 3)]
THEIR_NAMES = {"gelu_tanh": "gelu_new"}  # what AdapterHub's configurations call them


def random(*shape: int, seed: int, scale: float = 0.3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def make(hidden: int, width: int, seed: int = 0, **options: object) -> Bottleneck:
    return Bottleneck(
        **{
            "down": random(width, hidden, seed=seed),
            "up": random(hidden, width, seed=seed + 1),
            "activation": "relu",
            "reads": "sum",
            "down_bias": random(width, seed=seed + 2),
            "up_bias": random(hidden, seed=seed + 3),
            **options,
        }
    )


def norm_after(hidden: int, skip: str, *, inside: bool) -> NormAfter:
    return NormAfter(1 + random(hidden, seed=40), random(hidden, seed=41), skip, inside)  # type: ignore[arg-type]


def formula(b: Bottleneck, r: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The stream behind the site, in float64, as the primitive's docstring says it."""
    r, h = r.double(), h.double()
    x = {"sum": r + h, "output": h, "residual": r}[b.reads]
    if b.normalizes:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    act = get_activation(THEIR_NAMES.get(b.activation, b.activation))
    inner = x @ b.down.double().t() + (0 if b.down_bias is None else b.down_bias)
    out = b.scaling * act(inner) @ b.up.double().t() + (0 if b.up_bias is None else b.up_bias)
    if b.norm_after is None:
        return b.residual * r + h + out
    skip = r + h if b.norm_after.skip == "sum" else h
    inside, outside = (skip, 0) if b.norm_after.inside else (0, skip)
    weight, bias = b.norm_after.weight.double(), b.norm_after.bias.double()
    return b.residual * r + nn.functional.layer_norm(out + inside, (r.shape[-1],), weight, bias) + outside


def described(runs: list[tuple[int, int, int]], width: int) -> Segments:
    """A step's rows, by the bank of a model without modules."""
    bank = LowRankBank(nn.Module(), {}, StepContext(), TORCH)
    for _ in range(3):
        bank.install({})
    return replace(bank.segments(runs), max_width=width, site_floats=2 * HIDDEN + width)


VARIANTS: dict[str, Callable[[int, int], Bottleneck]] = {
    **{
        f"{act}": lambda hidden, seed, act=act: make(hidden, 7, seed, activation=act)  # type: ignore[misc]
        for act in ACTIVATIONS
    },
    "output": lambda hidden, seed: make(hidden, 12, seed, reads="output"),
    "residual": lambda hidden, seed: make(hidden, 3, seed, reads="residual"),
    "no biases": lambda hidden, seed: make(hidden, 5, seed, down_bias=None, up_bias=None),
    "scaled": lambda hidden, seed: make(hidden, 11, seed, scaling=0.3),
    "norm before": lambda hidden, seed: make(hidden, 6, seed, normalizes=True),
    "twice": lambda hidden, seed: make(hidden, 6, seed, residual=2.0),
    "never": lambda hidden, seed: make(hidden, 6, seed, residual=0.0),
    **{
        f"norm after, {skip}, inside {inside}": lambda hidden, seed, skip=skip, inside=inside: make(  # type: ignore[misc]
            hidden, 6, seed, norm_after=norm_after(hidden, skip, inside=inside)
        )
        for skip, inside in itertools.product(("output", "sum"), (False, True))
    },
}


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("minus", [0, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_by_its_formula(
    variant: str, minus: int, dtype: torch.dtype, kept: torch.dtype, native: bool
) -> None:
    kernels = load_kernels() if native else None
    if native and kernels is None:
        pytest.skip("no C++ compiler")
    site = BottleneckSite(0, kernels.panel if kernels else 0, torch.device("cpu"))
    primitives = {1: VARIANTS[variant](HIDDEN, 0), 3: make(HIDDEN, 20, seed=20)}
    for slot, primitive in primitives.items():
        rounded = {"down": primitive.down.to(kept), "up": primitive.up.to(kept)}
        primitives[slot] = rounded_one = make(
            HIDDEN, 1, **{f: getattr(primitive, f) for f in primitive.__dataclass_fields__} | rounded
        )
        site.install(slot, rounded_one)
    r, h = (random(ROWS, HIDDEN, seed=seed, scale=1.0).to(dtype) for seed in (7, 8))
    segments = described(RUNS, width=20)
    if kernels is None:
        out = site.run_torch(r, h, segments, minus=minus)
    else:
        out = h.clone()
        scratch = torch.full((ROWS * segments.site_floats,), torch.nan)
        kernels.bottleneck(
            DTYPES[dtype], site.address, segments.table.data_ptr(), len(RUNS), r.data_ptr(), h.data_ptr(),
            out.data_ptr(), ROWS, HIDDEN, scratch.data_ptr(), 20, minus, 2,
        )  # fmt: skip
    expected = h.double()
    for first, last, slot in RUNS:
        if slot in primitives:
            rows = slice(first, last)
            expected[rows] = formula(primitives[slot], r[rows], h[rows]) - minus * r[rows].double()
    tolerance = 2e-5 if dtype is torch.float32 else 0.02
    assert torch.allclose(out.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(out[:3], h[:3])
    assert torch.equal(out[9:11], h[9:11])


def test_a_removed_adapter_leaves_rows_alone() -> None:
    kernels = load_kernels()
    if kernels is None:
        pytest.skip("no C++ compiler")
    site = BottleneckSite(0, kernels.panel, torch.device("cpu"))
    site.install(1, make(HIDDEN, 4))
    site.install(40, make(HIDDEN, 4))
    site.remove(1)
    site.remove(1)
    h = random(4, HIDDEN, seed=1)
    segments = described([(0, 4, 1)], width=4)
    assert torch.equal(site.run_torch(h, h, segments), h)
    out = h.clone()
    kernels.bottleneck(
        0, site.address, segments.table.data_ptr(), 1, h.data_ptr(), h.data_ptr(), out.data_ptr(), 4, HIDDEN,
        torch.zeros(4 * segments.site_floats).data_ptr(), 4, 0, 2,
    )  # fmt: skip
    assert torch.equal(out, h)


def coupling(hidden: int) -> Coupling:
    def layers(seed: int) -> CouplingLayers:
        half, width = hidden // 2, 8
        return CouplingLayers(
            random(width, half, seed=seed),
            random(width, seed=seed + 1),
            random(half, width, seed=seed + 2),
            random(half, seed=seed + 3),
        )

    return Coupling(layers(60), layers(70), "relu")


def test_a_coupling_backwards_undoes_it() -> None:
    x = random(5, 64, seed=3, scale=1.0)
    there = couple(coupling(64), x, inverse=False)
    assert (there - x).abs().max() > 0.5
    assert torch.allclose(couple(coupling(64), there, inverse=True), x, atol=1e-5)


def adapters(engine: Engine) -> dict[str, AdapterWeights]:
    """At every site, at some, and with a coupling."""
    hidden, sites = engine.base.spec.hidden_size, list(engine.base.spec.residual)
    return {
        "all": AdapterWeights(
            "bottleneck", 0, bottlenecks={s: make(hidden, 9, seed=i) for i, s in enumerate(sites)}
        ),
        "second": AdapterWeights(
            "bottleneck", 0, bottlenecks={sites[3]: make(hidden, 4, reads="output", activation="silu")}
        ),
        "coupled": AdapterWeights(
            "bottleneck", 0, bottlenecks={sites[0]: make(hidden, 4)}, coupling=coupling(hidden)
        ),
    }


def reference(folder: Path, compiled: AdapterWeights, engine: Engine, tokens: list[int]) -> torch.Tensor:
    """The last logits, by hooks on transformers' own model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    spec, stream = engine.base.spec, {}

    def on_layer(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            stream[name] = args[0]

        return note

    def on_part(name: str) -> Callable[..., object]:
        where, primitive = spec.residual[name], compiled.bottlenecks.get(name)

        def change(module: nn.Module, args: object, out: object) -> object:
            h, r = out[0] if isinstance(out, tuple) else out, stream[where.layer]
            new = r + h if primitive is None else formula(primitive, r, h).float()
            stream[where.layer] = new
            return (new - r, *out[1:]) if isinstance(out, tuple) else new - r

        return change

    for layer in dict.fromkeys(where.layer for where in spec.residual.values()):
        model.get_submodule(layer).register_forward_pre_hook(on_layer(layer))
    for name, where in spec.residual.items():
        model.get_submodule(where.part).register_forward_hook(on_part(name))
    if compiled.coupling is not None:
        made = compiled.coupling
        first = model.get_submodule(next(iter(spec.residual.values())).layer)
        first.register_forward_pre_hook(
            lambda m, args: (couple(made, args[0], inverse=False), *args[1:]), prepend=True
        )
        model.get_output_embeddings().register_forward_pre_hook(
            lambda m, args: (couple(made, args[0], inverse=True),)
        )
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0, -1]


def stacked(*stacks: Stack) -> Stack:
    """Several adapters, each as it is."""
    members = [(adapter, 1.0) for stack in stacks for adapter in stack.adapters]
    check_stack(members)
    return Stack(members)


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_mixed_rows_equal_hooks_on_the_model(
    tiny_model: Callable[[str], Path],
    common_store: Callable[[str], Path],
    tmp_path: Path,
    architecture: str,
    native: bool,
) -> None:
    store = copy_of(common_store(architecture), tmp_path / "store", "lora")
    engine = make_engine(tiny_model(architecture), store, native=native)
    fused = [isinstance(m.forward, FusedDecoderLayer) for m in engine.base.model.modules()]
    assert any(fused) == (native and architecture != "gpt2" and load_kernels() is not None)
    bank, registry = engine.runner._bank, engine.adapters.registry
    made = adapters(engine)
    served: dict[str, Stack] = {"base": Stack()}
    for name, compiled in made.items():
        slot = bank.install(compiled)
        served[name] = Stack.of(registry.new_adapter(name, compiled.without_layer_weights(), slot))
    made["two"] = replace(
        made["coupled"], bottlenecks={**made["second"].bottlenecks, **made["coupled"].bottlenecks}
    )
    served["two"] = stacked(served["second"], served["coupled"])
    # Those with a LoRA run over a model that has it merged.
    merged = tmp_path / "merged"
    lora = load_reference(tiny_model(architecture), store / "lora", "float32")
    lora.merge_and_unload().save_pretrained(merged)
    beside = Stack.of(registry.current("lora"))
    for name in ("base", "all", "two"):
        served[f"{name} and lora"] = stacked(served[name], beside)
    served["lora and all"] = stacked(beside, served["all"])
    prompts = {name: list(range(5 + at, 30 + 3 * at)) for at, name in enumerate(served)}
    sequences = {
        name: SmokeTestSequence(name, prompts[name], served[name], engine.base.spec.vocabulary_size)
        for name in served
    }
    for sequence in sequences.values():
        sequence.stack.pin()
        engine.scheduler.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
    empty = AdapterWeights("none", 0)
    for name, sequence in sequences.items():
        folder = merged if "lora" in name else tiny_model(architecture)
        [of] = {*name.split(" and ")} - {"lora"}
        expected = reference(folder, made.get(of, empty), engine, prompts[name])
        base = reference(tiny_model(architecture), empty, engine, prompts[name])
        assert sequence.logits is not None
        assert (sequence.logits[0] - expected).abs().max() < 1e-4
        assert name == "base" or (expected - base).abs().max() > 1e-2
