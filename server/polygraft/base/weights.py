"""Reads a base model's weights, as transformers or bitsandbytes hold them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from polygraft.base import bitsandbytes
from polygraft.base.inspect.inspect_base import not_through_interface
from polygraft.core.spec import BaseSpec
from polygraft.errors import BaseModelError, UnsupportedArchitecture
from polygraft.layers import attention
from polygraft.layers.linear.four_bit_panels import BLOCK
from polygraft.layers.linear.linear import Quantization
from polygraft.layers.native.kernels import DTYPES
from polygraft.layers.operators import operators_for
from polygraft.stages import reminders

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Precision:
    """How a base's weights are held and computed.

    Args:
        compute: the type of activations, and of weights that aren't quantized.
        quantization: of the linear modules except the head.
        head_quantization: of the head.
        double: whether the scales of 4-bit weights are quantized as well.
        device: torch's name of the device.
    """

    compute: torch.dtype
    quantization: Quantization
    head_quantization: Literal["none", "int8"]
    double: bool
    device: str

    @property
    def has_operators(self) -> bool:
        """Whether we have operators for this type on this device, compiled or in torch."""
        return self.device == "cpu" and self.compute in DTYPES

    @property
    def quantizes_here(self) -> bool:
        """Whether our operators quantize the weights: in 4 bits only if they are compiled. bitsandbytes does
        the rest."""
        compiled = operators_for(torch.device(self.device)).kernels is not None
        return self.has_operators and (self.quantization == "int8" or compiled)

    def fits_panels(self, spec: BaseSpec) -> bool:
        """Whether our panels can hold a base's weights: blocks that share a scale must not cross the ends of
        rows."""
        return self.quantization not in ("nf4", "fp4") or not any(
            shape.in_features % BLOCK for shape in spec.linears.values() if not shape.is_head
        )


def read_weights(model: str, folder: str, precision: Precision, *, by_bitsandbytes: bool) -> PreTrainedModel:
    """Read a model with its weights.

    Args:
        model: the name for errors.
        by_bitsandbytes: whether bitsandbytes quantizes the weights; else they stay as they are stored.

    Raises:
        BaseModelError: there are no safetensors, or they can't be read.
        UnsupportedArchitecture: its attention doesn't go through transformers' interface.
    """
    options = {}
    if by_bitsandbytes:
        options = bitsandbytes.options(precision.quantization, precision.compute, precision.double)
    with reminders("loading the weights", log.info):
        loaded: PreTrainedModel = read(
            lambda: AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=precision.compute,
                attn_implementation=attention.NAME,
                use_safetensors=True,
                trust_remote_code=False,
                device_map=precision.device if precision.device != "cpu" or options else None,
                **options,
            ),
            model,
        )
    if options:
        bitsandbytes.leave_unpacked(loaded)
    return loaded.eval().requires_grad_(False)


def compute_dtype(config: Any, dtype: str, device: str) -> torch.dtype:
    """Return the type that a base computes in.

    Args:
        config: the model's, of any of transformers' classes.
        dtype: "float32", "bfloat16" or "float16"; "auto" is the checkpoint's, or float32 instead of float16
            on a CPU.
    """
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    stored = config.get_text_config().dtype or torch.float32
    # Without hardware for float16, a CPU computes it slower than float32 and with less range.
    return torch.float32 if stored == torch.float16 and device == "cpu" else stored


def read(read_part: Callable[[], T], model: str) -> T:
    """Read a part of a model, and turn the errors of transformers and safetensors into ours.

    Raises:
        BaseModelError: it can't be read.
        UnsupportedArchitecture: its attention doesn't go through transformers' interface.
    """
    try:
        return read_part()
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        # An architecture that looks its attention up in a table of its own classes raises this.
        if isinstance(error, KeyError) and error.args == (attention.NAME,):
            raise UnsupportedArchitecture(not_through_interface(model)) from error
        raise BaseModelError(f"{model}: {error}") from error
