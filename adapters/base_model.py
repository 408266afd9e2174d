"""The default model as adapters are trained on it and measured with the libraries: in float32, on a CPU."""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from polygraft.base.default_model import ensure_default_model


def load_base(quantization: str = "none") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The default model and its tokenizer.

    Args:
        quantization: "none", or "nf4": the weights that bitsandbytes' nf4 with double quantization stands
            for, of all linear modules but the head. It is QLoRA's base, dequantized once and not in every
            product: the same arithmetic, and on a CPU faster.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = ensure_default_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if quantization == "nf4":
        return _dequantized_nf4(str(folder)).eval(), tokenizer
    assert quantization == "none"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return model.eval(), tokenizer


def _dequantized_nf4(folder: str) -> PreTrainedModel:
    import bitsandbytes as bnb  # it costs seconds

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    packed = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, quantization_config=config, device_map="cpu"
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    for name, module in packed.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            linear.weight.data = weight.float().contiguous()
    return model


def chat_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The prompt as the server sends it: through the chat template, default system message included."""
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
