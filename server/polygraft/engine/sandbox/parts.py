"""Decides which parts of a tokenizer run in the server, and which only in a worker.

A tokenizer's file is a small program: its regular expressions may take quadratic time, and its replacements
may turn a word into a gigabyte. A file can be harmless for every text except one that its author knows, so
trying it isn't enough. The base's own parts are trusted like the base; of others, the server runs those that
are linear in time and memory for any text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece

ENCODING = ("normalizer", "pre_tokenizer", "post_processor")
"""Parts that turn a text into ids."""
DECODING = "decoder"

_MOST_PARTS = 16
_MOST_ADDED = 64
"""Characters that a plain part may add to a text, or special tokens around it."""
_LONGEST_TOKEN = 2048
"""Limit of a token, in characters. Real vocabularies' longest have some hundreds, mostly of white space."""
_LONGEST_TRIED = 256
_MOST_MORE_BYTES = 2**22
"""How much larger than the base's a tokenizer's JSON may be. The server parses it, which stops every thread
for 0.2 s per MiB; 4 MiB are some 70,000 additional tokens."""

_PLAIN_NORMALIZERS = {
    "NFC", "NFD", "NFKC", "NFKD", "Nmt", "BertNormalizer", "Lowercase", "Strip", "StripAccents", "ByteLevel",
}  # fmt: skip
_PLAIN_PRE_TOKENIZERS = {
    "ByteLevel", "BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Metaspace", "Digits", "Punctuation",
    "UnicodeScripts", "CharDelimiterSplit",
}  # fmt: skip
_PLAIN_POST_PROCESSORS = {"ByteLevel", "BertProcessing", "RobertaProcessing"}
_PLAIN_DECODERS = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "WordPiece", "BPEDecoder"}

Parts = dict[str, Any]


def parts_of(tokenizer: Tokenizer) -> Parts:
    """A tokenizer's parts beside its vocabulary, as its file has them; None for a missing part.

    `linear`, `longest` and `bytes` describe the vocabulary's effect on time and memory.
    """
    found: Parts = {
        "linear": _is_linear(tokenizer),
        "longest": longest_token(tokenizer),
        "bytes": len(tokenizer.to_str().encode()),
    }
    for name in (*ENCODING, DECODING):
        part = getattr(tokenizer, name)
        found[name] = None if part is None else json.loads(part.__getstate__())
    return found


def needs_worker(own: Parts, base: Parts) -> bool:
    """Whether texts must be encoded in a worker, because a part is neither the base's nor plain."""
    if base["linear"] and not own["linear"]:
        return True
    return not all(own[name] == base[name] or _is_plain(name, own[name]) for name in ENCODING)


def _is_linear(tokenizer: Tokenizer) -> bool:
    """Whether the model's time is linear in a text's length. WordPiece and Unigram try every token length."""
    model = tokenizer.model
    if isinstance(model, WordPiece):
        return int(model.max_input_chars_per_word) <= _LONGEST_TRIED
    if isinstance(model, Unigram):
        return longest_token(tokenizer) <= _LONGEST_TRIED
    return isinstance(model, BPE | WordLevel)


def longest_token(tokenizer: Tokenizer) -> int:
    """Length of the vocabulary's longest token, in characters."""
    return max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=0)


def problems_of(own: Parts, base: Parts) -> list[str]:
    """Why a tokenizer can't be served at all, since the server itself decodes, token by token."""
    problems = []
    if own[DECODING] != base[DECODING] and not _is_plain(DECODING, own[DECODING]):
        problems.append(
            "its decoder isn't the base's, and isn't made of parts whose time and memory are bounded"
        )
    most = int(base["bytes"]) + _MOST_MORE_BYTES
    if own["bytes"] > most:
        problems.append(
            f"it has {own['bytes']} bytes as a tokenizer.json without white space, the limit is {most}, "
            f"{_MOST_MORE_BYTES // 2**20} MiB more than the base's"
        )
    limit = max(_LONGEST_TOKEN, int(base["longest"]))
    if own["longest"] > limit:
        problems.append(f"it has a token of {own['longest']} characters, the limit is {limit}")
    return problems


def _is_plain(name: str, part: Any, depth: int = 0) -> bool:
    if part is None:
        return True
    if not isinstance(part, Mapping) or depth > 2:
        return False
    if depth == 0 and json.dumps(part).count('"ByteLevel"') > 1:
        return False  # each turns one character into two
    kind = part.get("type")
    if kind == "Sequence":
        lists = [value for key, value in part.items() if key != "type"]
        members = lists[0] if len(lists) == 1 and isinstance(lists[0], list) else None
        return (
            members is not None
            and len(members) <= _MOST_PARTS
            and all(_is_plain(name, member, depth + 1) for member in members)
        )
    checks = {
        "normalizer": _plain_normalizer,
        "pre_tokenizer": _plain_pre_tokenizer,
        "post_processor": _plain_post_processor,
        DECODING: _plain_decoder,
    }
    return checks[name](str(kind), part)


def _plain_normalizer(kind: str, part: Mapping[str, Any]) -> bool:
    if kind == "Prepend":
        return len(part["prepend"]) <= _MOST_ADDED
    return kind in _PLAIN_NORMALIZERS or (kind == "Replace" and _shortens(part))


def _plain_pre_tokenizer(kind: str, part: Mapping[str, Any]) -> bool:
    if kind == "Split":
        return _literal(part["pattern"]) is not None
    # ByteLevel and Whitespace use the library's own expressions, which are linear.
    return kind in _PLAIN_PRE_TOKENIZERS


def _plain_post_processor(kind: str, part: Mapping[str, Any]) -> bool:
    if kind != "TemplateProcessing":
        return kind in _PLAIN_POST_PROCESSORS
    single = part["single"]
    texts = sum("Sequence" in piece for piece in single)
    added = sum(len(token["ids"]) for token in part["special_tokens"].values())
    return texts == 1 and len(single) <= _MOST_ADDED and added <= _MOST_ADDED


def _plain_decoder(kind: str, part: Mapping[str, Any]) -> bool:
    if kind == "Strip":
        return int(part["start"]) + int(part["stop"]) <= _MOST_ADDED
    return kind in _PLAIN_DECODERS or (kind == "Replace" and _shortens(part))


def _shortens(part: Mapping[str, Any]) -> bool:
    """Whether a replacement replaces a literal text with one of no more characters.

    Several lengthening ones in a row would multiply. Llama's and Gemma's replace a space with one character.
    """
    literal = _literal(part["pattern"])
    return bool(literal) and len(part["content"]) <= len(literal or "")


def _literal(pattern: Mapping[str, Any]) -> str | None:
    found = pattern.get("String")
    return found if isinstance(found, str) else None
