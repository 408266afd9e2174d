"""Logits are the head's sums in float32, whatever the base's type is and whatever computes the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from polygraft.base.loader import load_base
from polygraft.config import ServerConfig
from polygraft.engine.engine import Engine
from polygraft.engine.sequences.sequence import SmokeTestSequence
from polygraft.layers import operators
from polygraft.layers.linear.wide_head import WideLinear
from polygraft_types.requests import (
    AdapterRef,
    LoraPath,
    Request,
    ResponseParams,
    ScoreRequest,
    StoppingParams,
)
from tests.architectures import MATRIX, SMOKE
from tests.engine.asking import PROMPT
from tests.engines import forced_logits, make_engine
from tests.tiny import save_random_model

SIXTEEN = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ON_THE_HEAD = ["lora-head", "lora-tokens-head", "lora-saved-head"]


def off_the_grid(logits: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> float:
    """The share of logits that a type of 16 bits can't hold."""
    assert logits.dtype == torch.float32
    known = logits[logits.isfinite()]
    return float((known != known.to(dtype).float()).float().mean())


@contextmanager
def seen_by_the_head(engine: Engine) -> Iterator[list[torch.Tensor]]:
    """What the head reads while it lasts, a tensor [rows, hidden] for each step."""
    seen: list[torch.Tensor] = []
    hook = engine.base.model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(args[0].view(-1, args[0].shape[-1]).double())
    )
    yield seen
    hook.remove()


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "load_kernels", lambda: None)


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "int8", "nf4"])
@pytest.mark.parametrize("operators", ["native", "torch", "no compiler"])
def test_they_are_the_products_of_what_the_head_reads(
    llama: Path, precision: str, operators: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if operators == "no compiler":
        without_compiler(monkeypatch)
    engine = make_engine(llama, precision=precision, native=operators == "native")
    weight = AutoModelForCausalLM.from_pretrained(llama, dtype=SIXTEEN.get(precision, torch.bfloat16))
    with seen_by_the_head(engine) as seen:
        logits = forced_logits(engine, [(PROMPT, None), (PROMPT[:5], None)])
    exact = torch.cat(seen) @ weight.lm_head.weight.double().t()
    assert (logits - exact).abs().max() < 1e-5
    assert off_the_grid(logits, SIXTEEN.get(precision, torch.bfloat16)) > 0.5


@pytest.mark.parametrize("compiler", [True, False])
def test_a_head_of_bytes(llama: Path, compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiler:
        without_compiler(monkeypatch)
    base = load_base(str(llama), dtype="bfloat16", quantization="int8", head_quantization="int8")
    engine = Engine(base, ServerConfig(kv_cache_bytes=2**20))
    assert off_the_grid(forced_logits(engine, [(PROMPT, None)])) > 0.9


def test_onednn_never_computes_a_head_of_sixteen_bits(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes everything else where there is no compiler."""
    without_compiler(monkeypatch)
    engine = make_engine(llama, precision="bfloat16")
    assert off_the_grid(forced_logits(engine, [(PROMPT, None)])) > 0.9


@pytest.mark.parametrize("native_operators", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("row", ON_THE_HEAD)
def test_adapters_on_the_head(
    llama: Path, adapter_store: Callable[[str], Path], row: str, native_operators: bool, tmp_path: Path
) -> None:
    copy(adapter_store("llama") / row, tmp_path / row)
    engine = make_engine(llama, tmp_path, precision="bfloat16", native=native_operators)
    logits = forced_logits(engine, [(PROMPT, row), (PROMPT, None)])
    assert off_the_grid(logits[0]) > 0.9
    assert off_the_grid(logits[1]) > 0.9
    assert not torch.equal(logits[0], logits[1])


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


@pytest.mark.parametrize("compiler", [True, False])
def test_merged_copies_of_the_head(
    llama: Path,
    adapter_store: Callable[[str], Path],
    compiler: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not compiler:
        without_compiler(monkeypatch)
    copy(adapter_store("llama") / "lora-head", tmp_path / "lora-head")
    engine = make_engine(llama, tmp_path, precision="bfloat16", native=compiler)
    sequence = SmokeTestSequence(
        "merged", PROMPT, engine.intake.resolve((AdapterRef("lora-head"),)), engine.base.spec.vocabulary_size
    )
    sequence.path = LoraPath.MERGED
    engine.paths.queue(sequence)
    engine.scheduler.add(sequence)
    while engine.has_work:
        engine.step()
    assert sequence.logits is not None
    assert off_the_grid(sequence.logits) > 0.9


@pytest.mark.parametrize("architecture", ["gemma2", "cohere", "granite"])
def test_what_the_models_own_code_makes_of_them(tmp_path: Path, architecture: str) -> None:
    """Soft-caps and scalings are computed in float32 as well."""
    model = save_random_model(
        tmp_path / "model", architecture, dict({**MATRIX, **SMOKE}[architecture].config), vectors=True
    )
    engine = make_engine(model, precision="bfloat16")
    assert off_the_grid(forced_logits(engine, [(PROMPT, None)])) > 0.9


def test_everybody_reads_them(llama: Path) -> None:
    """Log-probabilities, echoes, scores and sampling see the same float32 logits."""
    engine = make_engine(llama, precision="bfloat16")
    [row] = forced_logits(engine, [(PROMPT, None)])
    exact = row.log_softmax(-1)
    top = exact.topk(5)
    request = Request(
        "r",
        tuple(PROMPT),
        stopping=StoppingParams(max_new_tokens=1, ignore_eos=True),
        response=ResponseParams(logprobs=True, top_logprobs=5),
    )
    score = ScoreRequest("s", tuple(PROMPT), ((int(top.indices[3]),),))
    answered, scored = engine.generate([request, score])
    [found] = [one for output in answered for one in output.logprobs]
    assert found.logprob == float(top.values[0])
    assert [one.logprob for one in found.top] == top.values.tolist()
    assert scored[-1].scores[0].log_likelihood == float(top.values[3])


def test_float32_shares_nothing_and_costs_nothing(llama: Path) -> None:
    """A head in float32 stays what it was."""
    engine = make_engine(llama, native=False)
    assert not any(isinstance(module, WideLinear) for module in engine.base.model.modules())
