"""A model's parts without its own code between them give what the model gives, to the bit, or aren't taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from polygraft.base.loader import load_base
from polygraft.base.optimize.model_frame import PositionTable
from polygraft.config import ServerConfig
from polygraft.engine.engine import Engine
from polygraft.layers.native.kernels import load_kernels
from tests.architectures import MATRIX
from tests.base.optimize.test_layer_runs import all_logits, equal, mix, runs, warm_engine
from tests.engines import make_engine
from tests.tiny import save_random_model

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_it_gives_the_same_logits_as_the_model(
    tiny_model: Callable[[str], Path],
    common_store: Callable[[str], Path],
    architecture: str,
    precision: str,
) -> None:
    engine = warm_engine(tiny_model(architecture), common_store(architecture), precision)
    assert engine.runner._frame is not None
    engine.base.model.register_forward_pre_hook(lambda *_: pytest.fail("the model's own code runs"))
    by_frame = all_logits(engine, mix())
    engine.base.model._forward_pre_hooks.clear()
    engine.runner._frame = None
    assert equal(by_frame, all_logits(engine, mix()))


@pytest.mark.parametrize(
    ("architecture", "framed"),
    [("mistral", True), ("qwen3", True), ("gemma2", False), ("phi3", False), ("gpt_oss", False)],
)
def test_what_a_model_does_besides_keeps_its_own_code(
    tmp_path: Path, architecture: str, framed: bool
) -> None:
    # Gemma 2 caps its logits; Phi 3 and gpt-oss have layers of other makes.
    engine = make_engine(save_random_model(tmp_path, architecture, MATRIX[architecture].config))
    assert (engine.runner._frame is not None) == framed


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
    assert runs(engine) == [3]
    assert engine.runner._frame is None


@pytest.mark.parametrize("part", ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"])
def test_hooks_on_its_parts_are_called(llama: Path, part: str) -> None:
    engine = make_engine(llama, prefix_caching=False)
    before = all_logits(engine, mix()[:1])

    def halve(module: nn.Module, args: object, out: Any) -> object:
        return tuple(x / 2 for x in out) if isinstance(out, tuple) else out / 2

    engine.base.model.get_submodule(part).register_forward_hook(halve)
    by_frame = all_logits(engine, mix()[:1])
    assert not equal(by_frame, before)
    engine.runner._frame = None
    assert equal(by_frame, all_logits(engine, mix()[:1]))


class Rotary(nn.Module):
    """Counts its calls; positions are all that goes in."""

    calls = 0

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        angles = position_ids[..., None] * torch.arange(1, 5)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def test_a_position_table_gives_what_the_module_gives() -> None:
    rotary = Rotary()
    table = PositionTable(rotary, 3000)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(1, 3, 8, dtype=dtype)
        for positions in ([0, 5, 5], [1023], [1024, 7], [2999, 0], [3000, 1]):
            at = torch.tensor([positions])
            for mine, theirs in zip(table(x, at), Rotary()(x, at), strict=True):
                assert mine.dtype is dtype
                assert torch.equal(mine, theirs)
                assert mine.is_contiguous()
    # Filled twice for each type, as the positions grow, and asked itself behind the last that is kept.
    assert rotary.calls == 8


def test_a_position_table_never_asks_behind_the_context() -> None:
    class Short(Rotary):
        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert position_ids.max() < 1500
            return super().forward(x, position_ids)

    PositionTable(Short(), 1500)(torch.zeros(1), torch.tensor([[1100]]))
