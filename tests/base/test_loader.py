"""Loading a base: its type, its context, its size, and what can't be one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from polygraft.base.context_limit import context_limit
from polygraft.base.loader import inspect_without_weights, load_base
from polygraft.config import ServerConfig
from polygraft.engine.engine import Engine
from polygraft.errors import BaseModelError, UnsupportedArchitecture
from polygraft.layers import operators
from polygraft.layers.native.kernels import load_kernels
from tests.engines import greedy, make_engine, run_greedy
from tests.equivalence.reference import generate, load_reference
from tests.tiny import CONFIGS, EOS, VOCABULARY, byte_tokenizer, save_tiny_model


def save_in(folder: Path, model: Path, dtype: torch.dtype) -> Path:
    """The same model, saved in another type."""
    AutoModelForCausalLM.from_pretrained(model, dtype=dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("stored", "asked", "computed"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float32),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
)
def test_the_type_it_computes_in(
    llama: Path, tmp_path: Path, stored: torch.dtype, asked: str, computed: torch.dtype
) -> None:
    base = load_base(str(save_in(tmp_path / "m", llama, stored)), dtype=asked)
    assert base.dtype is computed
    assert {p.dtype for p in base.model.parameters()} == {computed}


def test_what_is_known_of_it(llama: Path) -> None:
    base = load_base(str(llama))
    assert (base.name, base.quantization, base.context_length, base.notes) == (llama.name, "none", 256, ())
    assert base.eos_token_ids == (EOS,)
    assert base.device == torch.device("cpu")
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())


@pytest.mark.parametrize("architecture", CONFIGS)
def test_weights_count_as_they_are_held(tiny_model: Callable[[str], Path], architecture: str) -> None:
    base = load_base(str(tiny_model(architecture)))
    plain = AutoModelForCausalLM.from_pretrained(tiny_model(architecture))
    head, embedding = plain.get_output_embeddings().weight, plain.get_input_embeddings().weight
    tied = head.data_ptr() == embedding.data_ptr()
    assert tied == (architecture != "qwen2")
    unique = sum(p.numel() for p in plain.parameters())
    assert base.spec.parameters == unique
    buffers = sum(buffer.nbytes for buffer in plain.buffers())
    # A packed head is a copy of the embedding that it is tied to.
    copied = head.nbytes if tied and load_kernels() is not None else 0
    assert base.weight_bytes == 4 * unique + buffers + copied


def test_a_limit_below_the_models_own(llama: Path) -> None:
    assert load_base(str(llama), max_context_length=100).context_length == 100
    assert load_base(str(llama), max_context_length=10**6).context_length == 256


# ---- long contexts ---------------------------------------------------------------------------------------

ROPE: list[tuple[dict[str, Any], int, str]] = [
    ({"rope_type": "default", "rope_theta": 1e4}, 256, ""),
    ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, 256, ""),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}, 256, ""),
    ({"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}, 64, "dynamic"),
    ({"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, 256, ""),
    ({"rope_type": "longrope", "original_max_position_embeddings": 64, "rope_theta": 1e4,
      "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}, 64, "longrope"),
]  # fmt: skip


@pytest.mark.parametrize(("rope", "limit", "name"), ROPE, ids=[f"{r['rope_type']}-{n}" for r, n, _ in ROPE])
def test_rope_that_looks_at_its_neighbours_is_capped_with_a_note(
    rope: dict[str, Any], limit: int, name: str
) -> None:
    config = AutoConfig.for_model("llama", **CONFIGS["llama"], rope_parameters=rope)
    got, notes = context_limit(config)
    assert got == limit
    if name:
        [note] = notes
        assert note.startswith(f"context capped at {limit} of 256 tokens: {name} RoPE")
    else:
        assert notes == ()


@pytest.mark.parametrize("rope", [ROPE[3][0], ROPE[5][0]], ids=["dynamic", "longrope"])
def test_up_to_the_cap_every_row_is_exact_beside_others(tmp_path: Path, rope: dict[str, Any]) -> None:
    folder = save_tiny_model(tmp_path / "m", "llama", rope_parameters=rope)
    engine = make_engine(folder)
    assert engine.model.context_length == 64
    assert engine.model.notes[0].startswith("context capped at 64 of 256")
    prompts = [list(range(5)), list(range(20, 78))]
    model = load_reference(folder, None, "float32")
    expected = [generate(model, prompt, 6).tokens for prompt in prompts]
    assert run_greedy(engine, [greedy(str(len(p)), p, None, 6) for p in prompts]) == expected


# ---- quantized -------------------------------------------------------------------------------------------


BITS = {"int8": 8, "nf4": 4, "fp4": 4}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", BITS)
def test_the_linear_modules_are_quantized_and_not_the_head(
    tiny_model: Callable[[str], Path], quantization: str, architecture: str
) -> None:
    folder = str(tiny_model(architecture))
    base = load_base(folder, quantization=quantization, dtype="bfloat16")
    plain = load_base(folder, dtype="bfloat16")
    body = 0
    for name, shape in base.spec.linears.items():
        error = base.model.get_submodule(name).weight.float() - plain.model.get_submodule(name).weight.float()
        assert (error == 0).all() if shape.is_head else error.norm() > 0
        body += 0 if shape.is_head else shape.in_features * shape.out_features
    assert base.quantization == quantization
    assert base.notes == (
        f"{quantization}: {len(base.spec.linears) - 1} of {len(base.spec.linears)} linear modules, the head not",
    )
    assert base.spec.parameters == plain.spec.parameters
    # Beside the codes there is a scale, for a column or for 64 inputs of it.
    saved = plain.weight_bytes - base.weight_bytes
    assert body * (16 - BITS[quantization]) / 8 > saved > body * (16 - BITS[quantization] - 1) / 8


@pytest.mark.parametrize("quantization", BITS)
def test_without_operators_others_quantize_to_the_same(
    llama: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    ours = load_base(str(llama), quantization=quantization, dtype="bfloat16")
    monkeypatch.setattr(operators, "load_kernels", lambda: None)
    theirs = load_base(str(llama), quantization=quantization, dtype="bfloat16")
    assert ours.notes == theirs.notes
    name = "model.layers.0.mlp.up_proj"
    mine, other = ours.model.get_submodule(name), theirs.model.get_submodule(name)
    assert type(mine) is not type(other)
    x = torch.randn(1, 5, mine.in_features).bfloat16()
    with torch.inference_mode():
        error = (mine(x) - other(x)).float().norm() / other(x).float().norm()
    assert error < 0.01


def test_rows_that_4_bit_blocks_dont_divide_go_to_bitsandbytes(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, "llama", hidden_size=96, num_attention_heads=6, num_key_value_heads=3)
    base = load_base(str(folder), quantization="nf4", dtype="bfloat16")
    module = base.model.get_submodule("model.layers.0.mlp.up_proj")
    assert "bitsandbytes" in type(module).__module__


@pytest.mark.parametrize(
    ("precision", "asked", "kept"),
    [
        ("int8", "auto", torch.bfloat16),
        ("nf4", "auto", torch.bfloat16),
        ("nf4", "float32", torch.float32),
        ("bfloat16", "auto", torch.bfloat16),
        ("float32", "auto", torch.float32),
        ("float32", "bfloat16", torch.bfloat16),
    ],
)
def test_adapters_are_never_quantized(
    llama: Path, llama_store: Path, precision: str, asked: str, kept: torch.dtype
) -> None:
    engine = make_engine(llama, llama_store, precision=precision, adapter_dtype=asked)
    for low_rank in engine.adapters.registry.compiled("lora").each("low_rank").values():
        assert (low_rank.a.dtype, low_rank.b.dtype) == (kept, kept)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_a_quantized_head(tiny_model: Callable[[str], Path], quantization: str, architecture: str) -> None:
    folder = str(tiny_model(architecture))
    base = load_base(folder, quantization=quantization, head_quantization="int8", dtype="bfloat16")
    plain = load_base(folder, quantization=quantization, dtype="bfloat16")
    (head,) = (name for name, shape in base.spec.linears.items() if shape.is_head)
    mine, theirs = base.model.get_submodule(head).weight, plain.model.get_submodule(head).weight
    assert 0 < (mine.float() - theirs.float()).abs().max() <= theirs.abs().max() / 127
    assert plain.weight_bytes - base.weight_bytes > 0.9 * theirs.numel()
    body = len(base.spec.linears) - 1
    expected = f"{quantization}: {body} of {body + 1} linear modules, the head int8"
    assert base.notes == ("int8: the head" if quantization == "none" else expected,)
    # The embedding, tied or not, is read and not multiplied.
    embedding = base.model.get_input_embeddings().weight
    assert torch.equal(embedding, plain.model.get_input_embeddings().weight)


def test_adapters_on_a_quantized_head(llama: Path, llama_store: Path) -> None:
    base = load_base(str(llama), dtype="float32", head_quantization="int8")
    engine = Engine(base, ServerConfig(adapters=llama_store, kv_cache_bytes=2**22))
    engine.adapters.load_store()
    engine.finish_background()
    names = (None, "lora-head", "lora-bias", "prefix", "lora-head")
    requests = [greedy(str(at), list(range(at, 40)), name, 6) for at, name in enumerate(names)]
    together = run_greedy(engine, requests)
    assert together == [run_greedy(engine, [request])[0] for request in requests]
    assert len({tuple(tokens) for tokens in together}) > 2


# ---- what can't be served --------------------------------------------------------------------------------


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def cant_load(folder: Path | str) -> str:
    with pytest.raises(BaseModelError) as caught:
        load_base(str(folder))
    text = str(caught.value)
    assert str(folder) in text
    return text


def test_no_safetensors(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "safetensors" in cant_load(copy)


def test_a_quantized_head_where_there_are_no_operators(llama: Path) -> None:
    with pytest.raises(BaseModelError, match="head_quantization int8: only on a CPU, in float32 or bfloat16"):
        load_base(str(llama), dtype="float16", head_quantization="int8")


def test_cut_safetensors(copy: Path) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    cant_load(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "no_such_type"}', "{}"])
def test_a_config_that_is_none(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    cant_load(copy)
    with pytest.raises(BaseModelError):
        inspect_without_weights(str(copy))


def test_weights_of_another_size(copy: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", "llama", hidden_size=32)
    shutil.copy(other / "model.safetensors", copy)
    cant_load(copy)


def test_an_empty_folder(tmp_path: Path) -> None:
    cant_load(tmp_path)


def test_no_such_folder() -> None:
    text = cant_load("./no/such/folder/at/all")
    assert "no such folder" in text


@pytest.mark.parametrize("left", [[], ["tokenizer_config.json"]])
def test_no_tokenizer(copy: Path, left: list[str]) -> None:
    for path in copy.glob("*token*"):
        if path.name not in left:
            path.unlink()
    assert "tokenizer" in cant_load(copy).lower()


def test_an_encoder_and_decoder(tmp_path: Path) -> None:
    AutoConfig.for_model("t5", d_model=16, num_layers=1, num_heads=2, vocab_size=VOCABULARY).save_pretrained(
        tmp_path
    )
    with pytest.raises(BaseModelError, match="T5Config"):
        inspect_without_weights(str(tmp_path))


SMALL = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": 257}
OUTSIDE: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 2},
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 2},
}  # fmt: skip
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
MIXING: dict[str, tuple[str, dict[str, Any], str]] = {
    "chunked attention": (
        "llama4_text",
        {**SHAPE, "intermediate_size_mlp": 64, "attention_chunk_size": 8, "num_local_experts": 2},
        "Llama4TextAttention masks otherwise than causally",
    ),
    "attention in both directions": (
        "gemma2", {**SHAPE, "use_bidirectional_attention": True}, "Gemma2Attention attends in both directions"
    ),
    "a mask that the layer makes": ("doge", SHAPE, "DogeAttention attends by a mask of its own"),
    "a recurrence beside attention": (
        "falcon_h1",
        {**SHAPE, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8,
         "mamba_chunk_size": 16},
        "falcon_h1 carries state from token to token outside attention",
    ),
    "convolutions between attention layers": (
        "lfm2", {**SHAPE, "layer_types": ["conv", "full_attention"]}, "lfm2 sends 1 of 2 layers' attention"
    ),
}  # fmt: skip


def save_default(folder: Path, architecture: str, config: dict[str, Any]) -> str:
    """A model as its architecture makes one."""
    made = AutoConfig.for_model(architecture, **SMALL, **config)
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("architecture", OUTSIDE)
def test_an_architecture_that_doesnt_ask_for_attention_is_refused(tmp_path: Path, architecture: str) -> None:
    folder = save_default(tmp_path, architecture, OUTSIDE[architecture])
    for load in (load_base, inspect_without_weights):
        with pytest.raises(
            UnsupportedArchitecture, match=r"send its attention through .* AttentionInterface"
        ):
            load(folder)


@pytest.mark.parametrize("case", MIXING)
def test_a_row_that_sees_what_a_packed_step_cant_tell_is_refused(tmp_path: Path, case: str) -> None:
    architecture, config, reason = MIXING[case]
    folder = save_default(tmp_path, architecture, config)
    with pytest.raises(UnsupportedArchitecture, match=reason):
        load_base(folder)
