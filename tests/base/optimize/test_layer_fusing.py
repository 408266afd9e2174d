"""One call for a whole decoder layer gives what its parts give, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from polygraft.base.loader import load_base
from polygraft.config import ServerConfig
from polygraft.engine import engine as engine_module
from polygraft.engine.engine import Engine
from polygraft.layers.decoder_layer import FusedDecoderLayer
from polygraft.layers.linear.linear import PackedLinear
from polygraft.layers.native.kernels import load_kernels
from tests.engines import forced_logits, make_engine

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")
ADAPTERS = [
    None, "lora", "lora", "lora-bias", "rslora-patterns", "prefix", "prompt", "lokr", "oft", "boft", "ia3-shared-input",
    "hra", None,
]  # fmt: skip


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def fused_layers(model: nn.Module) -> list[nn.Module]:
    return [
        module for module in model.modules() if isinstance(vars(module).get("forward"), FusedDecoderLayer)
    ]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "nf4"])
@pytest.mark.parametrize(
    ("architecture", "layers"), [("llama", 3), ("qwen2", 3), ("gemma3_text", 4), ("gpt2", 0)]
)
def test_a_mixed_step_gives_the_same_logits(
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Callable[[str], Path],
    common_store: Callable[[str], Path],
    architecture: str,
    layers: int,
    precision: str,
) -> None:
    rows = [([7 + at, *range(20, 30 + 5 * at)], name) for at, name in enumerate(ADAPTERS)]
    model, store = tiny_model(architecture), common_store(architecture)
    engine = make_engine(model, store, precision=precision)
    assert len(fused_layers(engine.base.model)) == layers
    monkeypatch.setattr(engine_module, "fuse_decoder_layers", lambda *_: None)
    parts = make_engine(model, store, precision=precision)
    assert not fused_layers(parts.base.model)
    logits = forced_logits(engine, rows)
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, forced_logits(parts, rows))


def test_without_the_operators_nothing_is_taken_over(llama: Path) -> None:
    assert not fused_layers(make_engine(llama, native=False).base.model)


def halved_residual(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda x, **kwargs: forward(x, **kwargs) / 2


def another_mlp(layer: nn.Module) -> None:
    forward = layer.mlp.forward
    layer.mlp.forward = lambda x: 2 * forward(x)


def no_norm(layer: nn.Module) -> None:
    layer.input_layernorm = nn.Identity()


def ungrouped(layer: nn.Module) -> None:
    layer.self_attn.k_proj = PackedLinear(layer.self_attn.q_proj.group, 2)


@pytest.mark.parametrize("change", [halved_residual, another_mlp, no_norm, ungrouped])
def test_a_layer_of_another_make_stays(llama: Path, change: Callable[[nn.Module], None]) -> None:
    base = load_base(str(llama))
    changed, *others = base.model.model.layers
    change(changed)
    engine = Engine(base, ServerConfig(kv_cache_bytes=2**20))
    assert fused_layers(engine.base.model) == others


def test_positions_of_another_width_go_through_the_modules(llama: Path) -> None:
    # As models have them that rotate a part of each head.
    layer = fused_layers(make_engine(llama).base.model)[0].forward
    assert isinstance(layer, FusedDecoderLayer)
    x = torch.zeros(1, 4, layer.hidden_size)
    dim = layer.attention.site.head_dim
    for shape, dtype, served in (
        ((1, 4, dim), torch.float32, True),
        ((1, 4, dim // 2), torch.float32, False),
        ((1, 1, dim), torch.float32, False),
        ((1, 4, dim), torch.bfloat16, False),
    ):
        assert layer._alone._serves(x, torch.zeros(shape, dtype=dtype)) is served
    assert not layer._alone._serves(x, torch.zeros(1, dim, 4).transpose(1, 2))
