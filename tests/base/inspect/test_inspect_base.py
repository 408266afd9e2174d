"""What adapters are checked against is the same with weights and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from polygraft.base.loader import inspect_without_weights, load_base
from polygraft.core.spec import EmbeddingShape, LinearShape, NormShape
from tests.tiny import CONFIGS


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_without_weights_it_is_the_same(
    tiny_model: Callable[[str], Path], architecture: str, quantization: str
) -> None:
    folder = str(tiny_model(architecture))
    loaded = load_base(folder, quantization=quantization, dtype="bfloat16").spec
    empty = inspect_without_weights(folder)
    assert dict(empty.linears) == dict(loaded.linears)
    assert dict(empty.attention) == dict(loaded.attention)
    assert list(empty.attention) == list(loaded.attention)
    assert empty.others.keys() == loaded.others.keys()
    assert dict(empty.norms) == dict(loaded.norms)
    for field in ("embedding", "name", "architecture", "hidden_size", "vocabulary_size", "parameters"):
        assert getattr(empty, field) == getattr(loaded, field)


def test_a_llama(tiny_model: Callable[[str], Path]) -> None:
    spec = inspect_without_weights(str(tiny_model("llama")))
    assert (spec.architecture, spec.hidden_size, spec.vocabulary_size) == ("llama", 64, 288)
    assert len(spec.linears) == 3 * 7 + 1
    assert spec.linears["model.layers.2.mlp.down_proj"] == LinearShape(128, 64)
    assert spec.linears["lm_head"] == LinearShape(64, 288, is_head=True)
    assert spec.others["model.embed_tokens"] == "Embedding"
    assert spec.embedding == EmbeddingShape("model.embed_tokens", 288, tied=True, resizable=True)
    assert spec.token_modules == ("model.embed_tokens", "lm_head")
    assert len(spec.norms) == 3 * 2 + 1
    assert spec.norms["model.norm"] == NormShape(64, has_bias=False)
    assert [s.kv_heads for s in spec.attention.values()] == [2, 2, 2]


def test_conv1d_and_windows(tiny_model: Callable[[str], Path]) -> None:
    gpt2 = inspect_without_weights(str(tiny_model("gpt2")))
    assert gpt2.linears["transformer.h.0.attn.c_attn"] == LinearShape(64, 192, has_bias=True)
    assert gpt2.norms["transformer.ln_f"] == NormShape(64, has_bias=True)
    gemma = inspect_without_weights(str(tiny_model("gemma3_text")))
    assert [site.window for site in gemma.attention.values()] == [24, 0, 24, 0]
    assert {(site.head_dim, site.value_dim) for site in gemma.attention.values()} == {(16, 16)}
    # Behind the heads, where they are normalised once they have been moved before the rows.
    assert gemma.norms["model.layers.0.self_attn.q_norm"] == NormShape(16, has_bias=False, axis=2)
