"""Bases quantized by bitsandbytes: on other devices, and where our own operators can't hold the weights."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from polygraft.layers.linear.four_bit_panels import BLOCK

_PACKED_OUTPUTS = 32
"""Columns in a block of the form that bitsandbytes packs 4-bit weights in."""


def options(quantization: str, compute: torch.dtype, double: bool) -> dict[str, Any]:
    """Options for transformers."""
    # Imported here: it costs seconds, and an unquantized base doesn't need it.
    from transformers import BitsAndBytesConfig

    # With `kernels` installed, bitsandbytes would ask a hub for one at import.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if quantization == "int8":
        # With its default threshold, rows would depend on their neighbours.
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
    """Keep bitsandbytes from packing what its packed form can't hold, on CPUs with products of bfloat16.

    At the first forward its 4-bit modules pack their weights (`_convert_weight_packed_for_cpu` of 0.50.2),
    which fails where blocks of a scale don't divide the inputs, or blocks of columns the outputs.
    """
    for module in model.modules():
        if not isinstance(module, nn.Linear) or not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        if module.in_features % BLOCK or module.out_features % _PACKED_OUTPUTS:
            vars(module)["support_avx512bf16_for_cpu"] = False
