"""Prompt tuning (arXiv 2104.08691) and P-tuning (2103.10385) as PEFT saves them, compiled to SoftPrompt.

Both save `prompt_embeddings [tokens, hidden]`; P-tuning's encoder has already been applied and isn't saved
(peft/utils/save_and_load.py). At inference they are the same: rows before the prompt's embeddings, at
positions 0 to tokens - 1 (peft/peft_model.py, PeftModelForCausalLM.forward).
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from polygraft.adapters.files.reader import FolderReader
from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.primitives import SoftPrompt
from polygraft.core.spec import BaseSpec


def take_virtual_tokens(reader: FolderReader) -> int:
    """Take the options that all kinds with virtual tokens share; returns their number."""
    tokens: int = reader.option("num_virtual_tokens", int, 0)
    if tokens < 1:
        reader.problems.append(f"num_virtual_tokens must be at least 1, got {tokens}")
    if reader.option("num_transformer_submodules", int, 1) != 1:
        reader.problems.append("num_transformer_submodules other than 1 is for encoder-decoder models")
    return tokens


def take_embeddings(
    reader: FolderReader, base: BaseSpec, *, wide: bool = False
) -> tuple[int, torch.Tensor | None]:
    """Take the number of virtual tokens and their embeddings.

    Returns: the number, and [tokens, hidden] or None after noting what is wrong.

    Args:
        wide: as in `FolderReader.take`.
    """
    tokens = take_virtual_tokens(reader)
    # The tensor's shape says what they say.
    reader.ignore("num_layers", "num_attention_heads", "token_dim")
    return tokens, reader.take("prompt_embeddings", (tokens, base.hidden_size), wide=wide)


def ignore_initialization(reader: FolderReader) -> None:
    """Pass over how a prompt was initialised."""
    reader.ignore(
        "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"
    )


def compile_prompt_tuning(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a prompt-tuning folder. Problems are noted in the reader."""
    ignore_initialization(reader)
    return (yield from _compile("prompt_tuning", reader, base))


def compile_p_tuning(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a P-tuning folder. Problems are noted in the reader."""
    reader.ignore(
        "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"
    )
    return (yield from _compile("p_tuning", reader, base))


def _compile(kind: str, reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    yield
    _, embeddings = take_embeddings(reader, base)
    prompt = None if embeddings is None else SoftPrompt(embeddings.contiguous())
    return AdapterWeights(kind, reader.parameters, prefix=prompt)
