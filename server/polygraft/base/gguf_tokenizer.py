"""Reads a byte-level BPE tokenizer from a GGUF file.

Transformers can do it too, but not every version is right: 5.17 takes another token for the end of the text,
and decodes by SentencePiece's rules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_CONTROL = 3
"""GGUF's type of control tokens, such as the end of a turn, which no text contains."""


def read_gguf_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer with its special tokens and its chat template.

    Raises:
        ValueError: the file holds a tokenizer of another kind, or none.
    """
    from gguf import GGUFReader

    fields = GGUFReader(path).fields

    def read(name: str) -> Any:
        if name not in fields:
            raise ValueError(f"{path.name} has no {name}")
        return fields[name].contents()

    kind = read("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(f"{path.name} holds a tokenizer of the kind {kind!r}, expected 'gpt2'")
    tokens: list[str] = read("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in read("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: id for id, token in enumerate(tokens)},
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="",
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1")
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind_of_token in zip(tokens, read("tokenizer.ggml.token_type"), strict=True)
            if kind_of_token == _CONTROL
        ]
    )
    special = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    named = {f"{name}_token": tokens[read(f"tokenizer.ggml.{key}_token_id")] for name, key in special.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=read("tokenizer.chat_template"), **named
    )
