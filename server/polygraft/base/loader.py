"""Loads the base model and its tokenizer, once."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from polygraft.base.context_limit import context_limit
from polygraft.base.default_config import default_config
from polygraft.base.default_model import HUB_ID, fetched_default_model
from polygraft.base.device import check_device
from polygraft.base.hub import CONFIGURATION, hub_folder
from polygraft.base.inspect.inspect_base import inspect_base
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
from polygraft.base.weights import Precision, compute_dtype, read, read_weights
from polygraft.core.spec import BaseSpec
from polygraft.errors import BaseModelError
from polygraft.layers import attention
from polygraft.layers.linear.linear import Quantization
from polygraft.stages import reminders

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Base:
    """A loaded base model. The engine wraps its modules in place; nothing else may run it.

    Args:
        name: the hub id or a folder's own name, which clients see.
        context_length: how many positions are exact.
        weight_bytes: of all weights as they are held, shared ones once.
        notes: for the user, such as that the context is capped.
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
        """The device of the weights."""
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
            "float16", for which we have no operators on a CPU.
        quantization: of the linear modules except the head.
        head_quantization: of the head, on a CPU.

    Raises:
        ConfigError: there is no such device.
        BaseModelError: there is no such model, it has no safetensors, or it has no fast tokenizer.
        UnsupportedArchitecture: its attention can't be served.
    """
    device = check_device(device)
    attention.register()
    disable_progress_bar()
    logging.getLogger("huggingface_hub").handlers.clear()  # otherwise its lines appear twice
    folder = resolve_model(model)
    config = read(lambda: AutoConfig.from_pretrained(folder, trust_remote_code=False), model)
    precision = Precision(
        compute_dtype(config, dtype, device), quantization, head_quantization, double_quantization, device
    )
    if head_quantization == "int8" and not precision.has_operators:
        raise BaseModelError(f"{model}: head_quantization int8: only on a CPU, in float32 or bfloat16")
    loaded, spec, by_bitsandbytes = _read_and_inspect(model, folder, precision)
    tokenizer = read(lambda: load_tokenizer(folder), model)
    _optimize(loaded, spec, precision, by_bitsandbytes=by_bitsandbytes)
    context_length, context_notes = _context_length(config, max_context_length)
    return Base(
        name=shown_name(model),
        model=loaded,
        tokenizer=tokenizer,
        spec=spec,
        dtype=precision.compute,
        quantization=quantization,
        context_length=context_length,
        eos_token_ids=_eos_token_ids(loaded, folder, tokenizer),
        weight_bytes=weight_bytes(loaded),
        notes=(
            *context_notes,
            *_quantization_notes(loaded, spec, precision),
            *_vocabulary_notes(spec, tokenizer),
        ),
    )


def _read_and_inspect(
    model: str, folder: str, precision: Precision
) -> tuple[PreTrainedModel, BaseSpec, bool]:
    """Return a model, its spec, and whether bitsandbytes has quantized its weights."""
    name = HUB_ID if model == DEFAULT else shown_name(model)
    by_bitsandbytes = precision.quantization != "none" and not precision.quantizes_here
    loaded = read_weights(model, folder, precision, by_bitsandbytes=by_bitsandbytes)
    spec = inspect_base(loaded, name, folder)
    if not by_bitsandbytes and not precision.fits_panels(spec):
        by_bitsandbytes = True
        loaded = read_weights(model, folder, precision, by_bitsandbytes=True)
        inspect_base(loaded, name)  # attaches the probes to the new model's attention layers
    return loaded, spec, by_bitsandbytes


def _optimize(model: PreTrainedModel, spec: BaseSpec, precision: Precision, *, by_bitsandbytes: bool) -> None:
    """Fuse the small modules, and pack and quantize the weights that bitsandbytes doesn't hold."""
    log.debug("fused modules: %s", dict(fuse(model, precision.compute)))
    body: Quantization = "none" if by_bitsandbytes else precision.quantization
    how: dict[str, Quantization] = {
        name: precision.head_quantization if shape.is_head else body for name, shape in spec.linears.items()
    }
    with reminders("packing the weights", log.info):
        if pack_linears(model, spec.same_input, how, double=precision.double):
            own_parameters(model)
            gather_weights(model)


def _context_length(config: Any, most: int | None) -> tuple[int, tuple[str, ...]]:
    """Return the context length, and notes on it."""
    limit, notes = context_limit(config)
    if most is not None and most > limit:
        notes += (f"--max-context-length {most} is more than the model's {limit}",)
    return limit if most is None else min(limit, most), notes


def _quantization_notes(model: PreTrainedModel, spec: BaseSpec, precision: Precision) -> tuple[str, ...]:
    """Say which weights are quantized."""
    if precision.quantization != "none":
        body = [name for name, shape in spec.linears.items() if not shape.is_head]
        head = "int8" if precision.head_quantization == "int8" else "not"
        count = count_quantized(model, body)
        return (f"{precision.quantization}: {count} of {len(spec.linears)} linear modules, the head {head}",)
    return ("int8: the head",) if precision.head_quantization != "none" else ()


def _vocabulary_notes(spec: BaseSpec, tokenizer: TextTokenizer) -> tuple[str, ...]:
    """Warn of token ids that the base has no embeddings for."""
    if tokenizer.size <= spec.vocabulary_size:
        return ()
    return (
        f"the tokenizer has ids up to {tokenizer.size - 1}, and there are embeddings for "
        f"{spec.vocabulary_size} tokens: requests with others are refused",
    )


def base_config(model: str) -> Any:
    """Return a base's configuration without loading its weights; the default model's is built in.

    Raises:
        BaseModelError: there is no such model.
    """
    if model == DEFAULT:
        return default_config()
    folder = locate(model)
    if not Path(folder).is_dir():
        folder = hub_folder(folder, CONFIGURATION)
    return read(lambda: AutoConfig.from_pretrained(folder, trust_remote_code=False), model)


def inspect_without_weights(model: str) -> BaseSpec:
    """Return a base's spec from its configuration alone, in a second or two.

    Raises:
        BaseModelError: there is no such model.
        UnsupportedArchitecture: its attention can't be served.
    """
    attention.register()
    config = base_config(model)
    with torch.device("meta"):
        # bfloat16, since transformers' grouped experts take nothing else on meta.
        empty: PreTrainedModel = read(
            lambda: AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation=attention.NAME
            ),
            model,
        ).eval()
    here = fetched_default_model() if model == DEFAULT else locate(model)
    folder = str(here) if here is not None and Path(here).is_dir() else ""
    return inspect_base(empty, HUB_ID if model == DEFAULT else shown_name(model), folder)


def _eos_token_ids(model: PreTrainedModel, folder: str, tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Return the end tokens that generation_config.json, the tokenizer's files or config.json name.

    An architecture's default, which config.json leaves out, doesn't count.
    """
    raw, _ = PreTrainedConfig.get_config_dict(folder)
    named: list[Any] = [model.generation_config.eos_token_id if model.generation_config else None]
    parts = [raw, *(raw.get(part) for part in ("text_config", "decoder", "generator"))]
    named += [part.get("eos_token_id") for part in parts if isinstance(part, dict)]
    named += [tokenizer.backend.token_to_id(token) for token in tokenizer.ends]
    ids: list[int] = []
    for one in named:
        ids += one if isinstance(one, list) else [] if one is None else [one]
    return tuple(dict.fromkeys(map(int, ids)))
