"""Prefix tuning (arXiv 2101.00190) as PEFT saves it, compiled to Prefix.

With or without a projection PEFT saves its result, `[tokens, layers * 2 * kv_heads * head_dim]`; row 2l of
the reshaped tensor is layer l's keys, 2l + 1 its values (peft/peft_model.py, get_prompt). Keys go into the
cache as they are, without rotation, and real tokens start at position `num_virtual_tokens`.
"""

from __future__ import annotations

from collections.abc import Collection, Generator
from typing import ClassVar

from polygraft.adapters.files.problems import Problem
from polygraft.adapters.files.reader import FolderReader
from polygraft.adapters.kind import side_path
from polygraft.adapters.peft.prompt_kind import PromptKind
from polygraft.core.primitives import Prefix, SoftPrompt
from polygraft.core.spec import BaseSpec


class PrefixTuning(PromptKind):
    """Keys and values before the prompt's, in every layer."""

    peft_type = "PREFIX_TUNING"
    title = "prefix tuning"
    paper = "2101.00190"
    rows = (
        side_path(
            "keys and values in the cache, one copy for all requests", "attention to the virtual tokens"
        ),
    )
    training_only: ClassVar[Collection[str]] = ("prefix_projection", "encoder_hidden_size", "init_weights")

    def __init__(self, reader: FolderReader, base: BaseSpec) -> None:
        super().__init__(reader, base)
        self._sites = list(base.attention.values())
        # The same numbers multiply to the same width in another order.
        first = self._sites[0]
        self._sizes = {
            "num_layers": len(self._sites),
            "num_attention_heads": first.kv_heads,
            "token_dim": first.kv_heads * first.head_dim,
        }
        self._asked = {key: reader.option(key, int, size) for key, size in self._sizes.items()}

    def check(self) -> None:
        """Check the options, and that the base's layers have keys and values of one shape."""
        super().check()
        shapes = {(site.kv_heads, site.head_dim, site.value_dim) for site in self._sites}
        if len(shapes) > 1 or any(head_dim != value_dim for _, head_dim, value_dim in shapes):
            raise Problem(
                "the base's layers have keys and values of different shapes, as prefix tuning can't"
            )
        differing = [key for key, size in self._sizes.items() if self._asked[key] != size]
        if differing:
            texts = [f"{key} is {self._asked[key]}, the base has {self._sizes[key]}" for key in differing]
            raise Problem(*texts)

    def virtual_tokens(self) -> Generator[None, None, Prefix | SoftPrompt]:
        """Cut the tensor into layers; yields between them. Raises Problem."""
        layers, first = len(self._sites), self._sites[0]
        width = layers * 2 * first.kv_heads * first.head_dim
        rows = self.reader.take("prompt_embeddings", (self.tokens, width))
        table = rows.view(self.tokens, 2 * layers, first.kv_heads, first.head_dim)
        keys, values = [], []
        for layer in range(layers):
            yield
            keys.append(table[:, 2 * layer].contiguous())
            values.append(table[:, 2 * layer + 1].contiguous())
        return Prefix(tuple(keys), tuple(values), start=self.tokens)
