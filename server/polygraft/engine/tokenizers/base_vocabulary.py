"""Recognizes the base's own tokenizer in an adapter's folder, however it was saved."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any

from google.protobuf.message import DecodeError
from transformers.convert_slow_tokenizer import import_protobuf

from polygraft.base.tokenizer import OPAQUE, SENTENCEPIECE, TextTokenizer
from polygraft.errors import AdapterInvalid

_MAX_SENTENCEPIECE_BYTES = 2**23
"""Twice Gemma's; larger ones are compared only by hash."""


class BaseVocabulary:
    """The base's tokenizer in the forms that others are compared to."""

    def __init__(self, base: TextTokenizer) -> None:
        self._base = base
        self._added = _added_tokens(base)

    @property
    def whole(self) -> bytes:
        """As a tokenizer.json. It may take 30 MB, so it isn't kept."""
        return self._base.backend.to_str().encode()

    @cached_property
    def _digest(self) -> bytes:
        return hashlib.sha256(self.whole).digest()

    @cached_property
    def skeleton(self) -> bytes:
        """The same with nothing but the added tokens."""
        content = json.loads(self.whole)
        vocabulary = {token["content"]: token["id"] for token in content["added_tokens"]}
        content["model"] = {"type": "BPE", "vocab": vocabulary, "merges": []}
        content.update(normalizer=None, pre_tokenizer=None, decoder=None)
        return json.dumps(content).encode()

    def adds_nothing(self, tokenizer: TextTokenizer) -> bool:
        """Whether a tokenizer has exactly the base's added tokens; meant for one read from the skeleton."""
        return _added_tokens(tokenizer) == self._added

    def equals(self, tokenizer: TextTokenizer) -> bool:
        """Whether a tokenizer equals the base's."""
        if not self.adds_nothing(tokenizer):
            return False
        return hashlib.sha256(tokenizer.backend.to_str().encode()).digest() == self._digest

    def is_file(self, file: str, content: bytes) -> bool:
        """Whether the base was read from a file with this name and content."""
        return self._base.hashes.get(file) == hashlib.sha256(content).hexdigest()

    def says_the_same(self, name: str, file: str, content: bytes) -> bool:
        """Whether a slow tokenizer's file holds the base's vocabulary.

        Args:
            name: the adapter's, for errors.

        Raises:
            AdapterInvalid: the file can't be read.
        """
        if file in OPAQUE:
            return False
        try:
            if file in SENTENCEPIECE:
                return self._has_pieces(content)
            model = json.loads(self.whole)["model"]
            if file == "vocab.json":
                return bool(json.loads(content) == model.get("vocab"))
            lines = content.decode().removesuffix("\n").split("\n")
            if file == "vocab.txt":
                return bool({line: at for at, line in enumerate(lines)} == model.get("vocab"))
            merges = [line for line in lines if line and not line.startswith("#version")]
            return merges == [_merge(one) for one in model.get("merges", ())]
        except (ValueError, RecursionError, DecodeError) as error:
            raise AdapterInvalid(name, [f"{file} can't be read: {error}"]) from None

    def _has_pieces(self, content: bytes) -> bool:
        """Whether all pieces of a SentencePiece model are the base's tokens, with the same ids."""
        if len(content) > _MAX_SENTENCEPIECE_BYTES:
            return False
        model = import_protobuf().ModelProto()
        model.ParseFromString(content)
        vocabulary = self._base.backend.get_vocab(with_added_tokens=True)
        return bool(model.pieces) and all(
            vocabulary.get(piece.piece) == at for at, piece in enumerate(model.pieces)
        )


def _added_tokens(tokenizer: TextTokenizer) -> tuple[Any, ...]:
    backend = tokenizer.backend
    added = {id: repr(token) for id, token in backend.get_added_tokens_decoder().items()}
    return added, backend.encode_special_tokens


def _merge(one: str | list[str]) -> str:
    return one if isinstance(one, str) else " ".join(one)
