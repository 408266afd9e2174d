"""What PEFT itself answers: one unpadded request at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.loha import LoHaLayer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

# What PEFT can't do: LoHa takes a packed weight's shape for the module's, and AdaLoRA over eight bits returns
# float32 from its modules, which attention refuses beside the others' bfloat16.
CANT = {PeftType.LOHA: ("nf4", "fp4"), PeftType.ADALORA: ("int8",)}


@dataclass(frozen=True)
class Reference:
    """Greedy tokens, and the float logits [steps, vocabulary] behind each."""

    tokens: list[int]
    logits: torch.Tensor


def load_reference(model_folder: Path, adapter_folder: Path | None, precision: str) -> torch.nn.Module:
    """A model with its adapter, as PEFT loads it."""
    options: dict[str, object] = {"dtype": torch.float32 if precision == "float32" else torch.bfloat16}
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
        if precision in CANT.get(PeftConfig.from_pretrained(str(adapter_folder)).peft_type, ()):
            _add_by_hand(model, load_reference(model_folder, adapter_folder, "float32"))
        else:
            model = PeftModel.from_pretrained(model, str(adapter_folder))
    return model.eval()


def _add_by_hand(model: torch.nn.Module, exact: torch.nn.Module) -> None:
    """Add what a kind adds in float32 behind the modules of a quantized model, as PEFT's layers would."""
    for name, layer in exact.base_model.model.named_modules():
        if isinstance(layer, LoHaLayer | AdaLoraLayer):
            delta = layer.get_delta_weight("default").detach()
            if getattr(layer, "fan_in_fan_out", False):
                delta = delta.T

            def add(
                module: torch.nn.Module,
                args: tuple[torch.Tensor],
                out: torch.Tensor,
                delta: torch.Tensor = delta,
            ) -> torch.Tensor:
                return (out + torch.nn.functional.linear(args[0].float(), delta)).to(out.dtype)

            model.get_submodule(name).register_forward_hook(add)


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
            **_task(model),
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = out.sequences[0].tolist()[-steps:]
    return Reference(tokens, torch.stack([step[0].float() for step in out.logits]))


def _task(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The first task, for a kind that asks each request for one."""
    config = getattr(model, "active_peft_config", None)
    several = config is not None and config.peft_type == PeftType.MULTITASK_PROMPT_TUNING
    return {"task_ids": torch.tensor([0])} if several else {}


def forced(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Logits [len(tokens), vocabulary] where the given tokens are forced, by generating each alone."""
    rows = [generate(model, prompt + tokens[:k], 1).logits[0] for k in range(len(tokens))]
    return torch.stack(rows)
