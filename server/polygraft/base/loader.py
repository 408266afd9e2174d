"""Loads the base model and its tokenizer, once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from polygraft.base import bitsandbytes
from polygraft.base.context_limit import context_limit
from polygraft.base.default_config import default_config
from polygraft.base.default_model import HUB_ID, fetched_default_model
from polygraft.base.device import check_device
from polygraft.base.hub import CONFIGURATION, hub_folder
from polygraft.base.inspect.inspect_base import inspect_base, not_through_interface
from polygraft.base.model_folder import DEFAULT, locate, resolve_model, shown_name
from polygraft.base.optimize.fusing import fuse
from polygraft.base.optimize.packing import (
    count_quantized,
    gather_weights,
    own_parameters,
    pack_linears,
    weight_bytes,
)
from polygraft.base.tokenizer import TextTokenizer, load_tokenizer
from polygraft.core.spec import BaseSpec
from polygraft.errors import BaseModelError, UnsupportedArchitecture
from polygraft.layers import attention
from polygraft.layers.linear.four_bit_panels import BLOCK
from polygraft.layers.linear.linear import Quantization
from polygraft.layers.native.kernels import DTYPES, load_kernels
from polygraft.stages import reminders

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Base:
    """A loaded base model. The engine wraps its modules in place; nothing else may run it.

    Args:
        name: the hub id, or a folder's own name: clients see it.
        context_length: most positions that are exact.
        parameters: of the whole model, counted before quantization packs them.
        weight_bytes: of all weights as they are held, shared ones once.
        notes: what a user should know, such as a capped context.
    """

    name: str
    model: PreTrainedModel
    tokenizer: TextTokenizer
    spec: BaseSpec
    dtype: torch.dtype
    quantization: str
    context_length: int
    eos_token_ids: tuple[int, ...]
    weight_bytes: int
    notes: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        first: torch.Tensor = next(iter(self.model.parameters()))
        return first.device


def load_base(
    model: str,
    *,
    dtype: str = "auto",
    quantization: Quantization = "none",
    head_quantization: Literal["none", "int8"] = "none",
    double_quantization: bool = True,
    device: str = "cpu",
    max_context_length: int | None = None,
) -> Base:
    """Load a base model for serving.

    Args:
        model: "default", a local folder, or a hub id.
        dtype: "auto" (the checkpoint's; float16 becomes float32 on a CPU), "float32", "bfloat16" or
            "float16", for which a CPU has no operators of ours.
        quantization: of the linear modules but the head.
        head_quantization: of the head, on a CPU.

    Raises:
        ConfigError: no such device.
        BaseModelError: no such model, no safetensors, or no fast tokenizer.
        UnsupportedArchitecture: its attention can't be served.
    """
    device = check_device(device)
    attention.register()
    disable_progress_bar()
    logging.getLogger("huggingface_hub").handlers.clear()  # otherwise its lines appear twice
    folder = resolve_model(model)
    config = _read(lambda: AutoConfig.from_pretrained(folder, trust_remote_code=False), model)
    compute = _compute_dtype(dtype, config, device)

    def load(by_bitsandbytes: bool) -> PreTrainedModel:
        options = bitsandbytes.options(quantization, compute, double_quantization) if by_bitsandbytes else {}
        with reminders("loading the weights", log.info):
            loaded: PreTrainedModel = _read(
                lambda: AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=compute,
                    attn_implementation=attention.NAME,
                    use_safetensors=True,
                    trust_remote_code=False,
                    device_map=device if device != "cpu" or options else None,
                    **options,
                ),
                model,
            )
        if options:
            bitsandbytes.leave_unpacked(loaded)
        return loaded.eval().requires_grad_(False)

    # Our own operator takes int8 and, if compiled, 4 bits on a CPU; anything else is bitsandbytes' matter.
    ours = device == "cpu" and compute in DTYPES and (quantization == "int8" or load_kernels() is not None)
    loaded = load(by_bitsandbytes=quantization != "none" and not ours)
    tokenizer = _read(lambda: load_tokenizer(folder), model)
    name = HUB_ID if model == DEFAULT else shown_name(model)
    spec = inspect_base(loaded, name, folder)
    body = {n: shape for n, shape in spec.linears.items() if not shape.is_head}
    if ours and quantization in ("nf4", "fp4") and any(s.in_features % BLOCK for s in body.values()):
        # Blocks of a scale run over the ends of rows, which panels can't hold.
        ours = False
        loaded = load(by_bitsandbytes=True)
        inspect_base(loaded, name)  # its own attention layers need their probes
    log.debug("operators of our own: %s", dict(fuse(loaded, compute)))
    limit, notes = context_limit(config)
    how: dict[str, Quantization] = dict.fromkeys(body, quantization if ours else "none")
    if head_quantization == "int8":
        if device != "cpu" or compute not in DTYPES:
            raise BaseModelError(f"{model}: head_quantization int8: only on a CPU, in float32 or bfloat16")
        how.update((name, "int8") for name in spec.linears if name not in body)
    with reminders("packing the weights", log.info):
        if pack_linears(loaded, spec.same_input, how, double=double_quantization):
            own_parameters(loaded)
            gather_weights(loaded)
    head = "int8" if head_quantization == "int8" else "not"
    if quantization != "none":
        count = count_quantized(loaded, body)
        notes += (f"{quantization}: {count} of {len(spec.linears)} linear modules, the head {head}",)
    elif head_quantization != "none":
        notes += ("int8: the head",)
    if tokenizer.size > spec.vocabulary_size:
        notes += (
            f"the tokenizer has ids up to {tokenizer.size - 1}, and there are embeddings for "
            f"{spec.vocabulary_size} tokens: requests with others are refused",
        )
    if max_context_length is not None:
        if max_context_length > limit:
            notes += (f"--max-context-length {max_context_length} is more than the model's {limit}",)
        limit = min(limit, max_context_length)
    return Base(
        name=shown_name(model),
        model=loaded,
        tokenizer=tokenizer,
        spec=spec,
        dtype=compute,
        quantization=quantization,
        context_length=limit,
        eos_token_ids=_eos_token_ids(loaded, folder, tokenizer),
        weight_bytes=weight_bytes(loaded),
        notes=notes,
    )


def base_config(model: str) -> Any:
    """The base's configuration: the default model's is built in, others are read without their weights.

    Raises:
        BaseModelError: no such model.
    """
    if model == DEFAULT:
        return default_config()
    folder = locate(model)
    if not Path(folder).is_dir():
        folder = hub_folder(folder, CONFIGURATION)
    return _read(lambda: AutoConfig.from_pretrained(folder, trust_remote_code=False), model)


def compute_dtype(model: str, dtype: str = "auto", device: str = "cpu") -> torch.dtype:
    """The type that a base computes in under these settings of `load_base`. Raises: as base_config."""
    return _compute_dtype(dtype, base_config(model), device)


def inspect_without_weights(model: str) -> BaseSpec:
    """The base's spec from its configuration alone, in a second or two.

    Raises: as load_base.
    """
    attention.register()
    config = base_config(model)
    with torch.device("meta"):
        # bfloat16, since transformers' grouped experts take nothing else on meta.
        empty: PreTrainedModel = _read(
            lambda: AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation=attention.NAME
            ),
            model,
        ).eval()
    here = fetched_default_model() if model == DEFAULT else locate(model)
    folder = str(here) if here is not None and Path(here).is_dir() else ""
    return inspect_base(empty, HUB_ID if model == DEFAULT else shown_name(model), folder)


def _compute_dtype(dtype: str, config: Any, device: str) -> torch.dtype:
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    stored = config.get_text_config().dtype or torch.float32
    # Without hardware for float16, a CPU computes it slower than float32 and with less range.
    return torch.float32 if stored == torch.float16 and device == "cpu" else stored


def _eos_token_ids(model: PreTrainedModel, folder: str, tokenizer: TextTokenizer) -> tuple[int, ...]:
    """All end tokens that the folder names, in generation_config.json, the tokenizer's files and config.json.
    An architecture's default in config.json doesn't count."""
    raw, _ = PreTrainedConfig.get_config_dict(folder)
    named: list[Any] = [model.generation_config.eos_token_id if model.generation_config else None]
    parts = [raw, *(raw.get(part) for part in ("text_config", "decoder", "generator"))]
    named += [part.get("eos_token_id") for part in parts if isinstance(part, dict)]
    named += [tokenizer.backend.token_to_id(token) for token in tokenizer.ends]
    ids: list[int] = []
    for one in named:
        ids += one if isinstance(one, list) else [] if one is None else [one]
    return tuple(dict.fromkeys(map(int, ids)))


def _read(read: Callable[[], T], model: str) -> T:
    try:
        return read()
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        # What an architecture with a table of attention classes of its own says.
        if isinstance(error, KeyError) and error.args == (attention.NAME,):
            raise UnsupportedArchitecture(not_through_interface(model)) from error
        raise BaseModelError(f"{model}: {error}") from error
