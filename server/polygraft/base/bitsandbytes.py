"""Lets bitsandbytes quantize a base on other devices, and where our operators can't hold the weights."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from polygraft.layers.linear.four_bit_panels import BLOCK

_PACKED_OUTPUTS = 32
"""How many columns a block has in bitsandbytes' packed form of 4-bit weights."""


def options(quantization: str, compute: torch.dtype, double: bool) -> dict[str, Any]:
    """Return the options for transformers' `from_pretrained`."""
    # Imported here because it takes seconds, and an unquantized base doesn't need it.
    from transformers import BitsAndBytesConfig

    # With `kernels` installed, bitsandbytes would ask a hub for one at import.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if quantization == "int8":
        # With the default threshold, rows would depend on other rows.
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=compute,
        )
    }


def leave_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from packing weights that its packed form can't hold, on CPUs with AVX512-BF16.

    Its 4-bit modules pack their weights in the first forward (`_convert_weight_packed_for_cpu` of 0.50.2).
    That fails if the inputs aren't a multiple of a scale's block, or the outputs of a block of columns.
    """
    for module in model.modules():
        if not isinstance(module, nn.Linear) or not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        if module.in_features % BLOCK or module.out_features % _PACKED_OUTPUTS:
            vars(module)["support_avx512bf16_for_cpu"] = False
