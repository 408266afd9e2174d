"""What PEFT itself answers: one unpadded request at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.ia3 import IA3Layer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


@dataclass(frozen=True)
class Reference:
    """Greedy tokens, and the float logits [steps, vocabulary] behind each."""

    tokens: list[int]
    logits: torch.Tensor


def load_reference(model_folder: Path, adapter_folder: Path | None, precision: str) -> torch.nn.Module:
    """A model with its adapter, as PEFT loads it."""
    dtypes = {"float32": torch.float32, "float16": torch.float16}
    options: dict[str, object] = {"dtype": dtypes.get(precision, torch.bfloat16)}
    if precision in ("nf4", "fp4"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=precision,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    elif precision == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    if "quantization_config" in options:
        options["device_map"] = "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_folder, **options)
    if adapter_folder is not None:
        model = PeftModel.from_pretrained(model, str(adapter_folder))
        if precision != "float32":
            _round_scaled(model)
    return model.eval()


def _round_scaled(model: torch.nn.Module) -> None:
    """Over quantized modules PEFT's (IA)^3 returns float32, which attention refuses beside the others' bfloat16."""
    for module in model.modules():
        if isinstance(module, IA3Layer):
            module.register_forward_hook(lambda module, args, out: out.bfloat16())


def generate(model: torch.nn.Module, prompt: list[int], steps: int) -> Reference:
    """Greedy tokens by the library's own `generate`, end of sequence ignored."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = out.sequences[0].tolist()[-steps:]
    return Reference(tokens, torch.stack([step[0].float() for step in out.logits]))


def forced(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Logits [len(tokens), vocabulary] where the given tokens are forced, by generating each alone."""
    rows = [generate(model, prompt + tokens[:k], 1).logits[0] for k in range(len(tokens))]
    return torch.stack(rows)
