"""Prefix tuning (arXiv 2101.00190) and Cartridges (2506.06266) as PEFT saves them, compiled to Prefix.

With or without a projection PEFT saves its result, `[tokens, layers * 2 * kv_heads * head_dim]`; row 2l of
the reshaped tensor is layer l's keys, 2l + 1 its values (peft/peft_model.py, get_prompt). Keys go into the
cache as they are, without rotation, and real tokens start at position `num_virtual_tokens`. A Cartridge is
keys and values that were trained as such, saved and applied in the same way (peft/tuners/cartridge/model.py).
"""

from __future__ import annotations

from collections.abc import Generator

from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.peft.soft_prompt import take_virtual_tokens
from polygraft.core.adapter_weights import AdapterWeights
from polygraft.core.primitives import Prefix
from polygraft.core.spec import BaseSpec


def compile_prefix_tuning(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a prefix-tuning folder; yields between layers. Problems are noted in the reader."""
    reader.ignore("prefix_projection", "encoder_hidden_size", "init_weights")
    return (yield from _compile("prefix_tuning", reader, base))


def compile_cartridge(reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    """Compile a Cartridge's folder; yields between layers. Problems are noted in the reader."""
    reader.ignore("num_frozen_tokens")
    return (yield from _compile("cartridge", reader, base))


def _compile(kind: str, reader: FolderReader, base: BaseSpec) -> Generator[None, None, AdapterWeights]:
    tokens = take_virtual_tokens(reader)
    sites = list(base.attention.values())
    shapes = {(site.kv_heads, site.head_dim, site.value_dim) for site in sites}
    if len(shapes) > 1 or any(head_dim != value_dim for _, head_dim, value_dim in shapes):
        reader.problems.append(
            "the base's layers have keys and values of different shapes, as prefix tuning can't"
        )
    kv_heads, head_dim, _ = next(iter(shapes))
    # The same numbers multiply to the same width in another order.
    served = {"num_layers": len(sites), "num_attention_heads": kv_heads, "token_dim": kv_heads * head_dim}
    for key, have in served.items():
        asked = reader.option(key, int, have)
        if asked != have:
            reader.problems.append(f"{key} is {asked}, the base has {have}")
    rows = reader.take("prompt_embeddings", (tokens, len(sites) * 2 * kv_heads * head_dim))
    prefix = None
    if rows is not None and not reader.problems:
        table = rows.view(tokens, 2 * len(sites), kv_heads, head_dim)
        keys, values = [], []
        for layer in range(len(sites)):
            yield
            keys.append(table[:, 2 * layer].contiguous())
            values.append(table[:, 2 * layer + 1].contiguous())
        prefix = Prefix(tuple(keys), tuple(values), start=tokens)
    return AdapterWeights(kind, reader.parameters, prefix=prefix)
