"""Operators take over modules only where they give the same results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from polygraft.base.optimize.fusing import fuse
from polygraft.layers import operators
from polygraft.layers.fused import FusedMlp, FusedRmsNorm
from polygraft.layers.native.kernels import load_kernels

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]


class TinyConfig:
    hidden_size = 16
    intermediate_size = 24
    mlp_bias = False
    hidden_act = "silu"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("architecture", "norms", "layers"),
    [("llama", 7, 3), ("qwen2", 7, 3), ("gemma3_text", 25, 4), ("gpt2", 0, 0)],
)
def test_a_model_answers_as_before(
    tiny_model: Callable[[str], Path], architecture: str, norms: int, layers: int, dtype: torch.dtype
) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(tiny_model(architecture)), dtype=dtype).eval()
    ids = torch.arange(40)[None] % 250
    with torch.inference_mode():
        expected = model(ids).logits
        fused = fuse(model, dtype)
        out = model(ids).logits
    assert fused == {"rms_norm": norms, "mlp": layers, "rotary": layers} or not norms
    error = (out - expected).norm() / expected.norm()
    assert error < (0.03 if dtype == torch.bfloat16 else 1e-5)


def test_other_models_keep_their_rotary_positions(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(llama))
    other = AutoModelForCausalLM.from_pretrained(str(llama))
    assert fuse(model, torch.float32)["rotary"] == 3
    attention = other.get_submodule("model.layers.0.self_attn")
    assert type(attention).forward.__globals__["apply_rotary_pos_emb"] is apply_rotary_pos_emb
    assert "forward" not in vars(attention)


class LiarRMSNorm(LlamaRMSNorm):
    """Named like one, but centred."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class StrictRMSNorm(LlamaRMSNorm):
    """Takes a second argument."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * gate


class OtherMLP(LlamaMLP):
    """Has the parts, and puts them together another way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


@pytest.mark.parametrize("make", [LiarRMSNorm, StrictRMSNorm])
def test_a_norm_that_isnt_what_its_name_says_stays(make: type[LlamaRMSNorm]) -> None:
    model = nn.Sequential(make(16))
    assert not fuse(model, torch.float32)
    assert type(model[0]) is make


@pytest.mark.parametrize("activation", ["relu", "gelu", "sigmoid"])
def test_an_activation_without_an_operator_stays(activation: str) -> None:
    mlp = LlamaMLP(TinyConfig())
    mlp.act_fn = ACT2FN[activation]
    model = nn.Sequential(mlp)
    assert not fuse(model, torch.float32)


@pytest.mark.parametrize(("activation", "index"), [("silu", 0), ("gelu_pytorch_tanh", 1)])
def test_activations_with_an_operator(activation: str, index: int) -> None:
    mlp = LlamaMLP(TinyConfig())
    mlp.act_fn = ACT2FN[activation]
    model = nn.Sequential(mlp)
    assert fuse(model, torch.float32) == {"mlp": 1}
    assert isinstance(model[0], FusedMlp)
    assert model[0].activation == index


def test_a_feed_forward_put_together_another_way_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OtherMLP(TinyConfig()))
    assert not fuse(model, torch.float32)


def test_rotary_positions_of_another_make_stay(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(llama))
    attention = type(model.get_submodule("model.layers.0.self_attn"))

    def interleaved(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def one(x: torch.Tensor) -> torch.Tensor:
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
            return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)

        return one(q), one(k)

    monkeypatch.setitem(attention.forward.__globals__, "apply_rotary_pos_emb", interleaved)
    assert fuse(model, torch.float32)["rotary"] == 0


def test_without_operators_everything_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "load_kernels", lambda: None)
    model = nn.Sequential(LlamaRMSNorm(16))
    assert not fuse(model, torch.float32)
    assert not isinstance(model[0], FusedRmsNorm)
