"""QLoRA (arXiv 2305.14314): a LoRA made over nf4 weights with double quantization, served on the same weights.

The matrix holds every kind in nf4 against the float32 base. Here the truth is what the adapter was trained on:
the quantized weights as they are, in float32 arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tests.engines import forced_logits, greedy, make_engine, run_greedy
from tests.equivalence.reference import forced, generate, load_reference
from tests.peft_folders import CAUSAL
from tests.tiny import CONFIGS

STEPS = 8
PROMPT = [(17 * at + 5) % 250 for at in range(20)]
ALLOWANCE = 1.5


def dequantized(model_folder: Path) -> torch.nn.Module:
    """The base in float32 with the values that its nf4 weights have."""
    wide = load_reference(model_folder, None, "float32")
    modules = dict(load_reference(model_folder, None, "nf4").named_modules())
    quantized = 0
    for name, module in wide.named_modules():
        packed = modules[name]
        if isinstance(packed, bnb.nn.Linear4bit):
            assert packed.weight.quant_state.nested
            values = bnb.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state).float()
            module.weight.data = values.T.contiguous() if isinstance(module, Conv1D) else values
            quantized += 1
    assert quantized
    return wide


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_qlora_is_served_on_the_weights_it_was_trained_on(
    tiny_model: Callable[[str], Path], tmp_path: Path, architecture: str
) -> None:
    base = tiny_model(architecture)
    quantized = load_reference(base, None, "nf4")
    torch.manual_seed(0)
    trained = get_peft_model(
        prepare_model_for_kbit_training(quantized, use_gradient_checkpointing=False),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **CAUSAL),
    )
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.15)
    trained.save_pretrained(tmp_path / "store" / "qlora")
    folder = str(tmp_path / "store" / "qlora")
    exact = generate(PeftModel.from_pretrained(dequantized(base), folder).eval(), PROMPT, STEPS)
    theirs = forced(load_reference(base, Path(folder), "nf4"), PROMPT, exact.tokens) - exact.logits
    engine = make_engine(base, tmp_path / "store", precision="nf4")
    ours = (
        forced_logits(engine, [(PROMPT + exact.tokens[:at], "qlora") for at in range(STEPS)]) - exact.logits
    )
    assert ours.square().mean().sqrt() <= ALLOWANCE * theirs.square().mean().sqrt()
    # The quantization itself isn't an error here, and the adapter is far from none.
    unadapted = forced(AutoModelForCausalLM.from_pretrained(base), PROMPT, exact.tokens) - exact.logits
    assert ours.abs().max() < 0.1 * unadapted.abs().max()
    (tokens,) = run_greedy(engine, [greedy("r", PROMPT, "qlora", STEPS)])
    gaps = exact.logits.topk(2).values.diff(dim=-1).abs().squeeze(-1)
    clear = gaps > 2 * theirs.abs().amax(-1)
    differs = torch.tensor(tokens) != torch.tensor(exact.tokens)
    assert not differs.any() or not clear[int(differs.int().argmax())]
