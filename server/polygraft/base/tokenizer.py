"""A tokenizer whose results depend on the text alone, not on earlier calls."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer
from transformers.utils import cached_file

from polygraft.panics import is_panic

T = TypeVar("T")
DEFAULT_TEMPLATE = "default"
"""The name of the chat template that transformers uses by default, of several."""
SPECIAL_TOKENS = "special_tokens_map.json"
_END_ROLES = ("eos_token", "eot_token")
"""Roles of the special tokens that end a sequence or a turn, and so an answer."""
_PROBE = "a b"
TOKENIZER = "tokenizer.json"
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
OPAQUE = ("tekken.json", "tiktoken.model", "qwen.tiktoken")
"""Vocabulary files that are compared with the base's by hash only."""
VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt", *SENTENCEPIECE, *OPAQUE)
"""Vocabulary files of slow tokenizers, which have no tokenizer.json."""


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class TextTokenizer:
    """A `tokenizers.Tokenizer` and its settings. Immutable, so thread-safe.

    Args:
        backend: encodes and decodes. It never truncates, pads or skips merges at random, whatever its file
            says.
        size: the largest token id plus one.
        longest: the length of the longest token in characters.
        hidden: texts of the tokens that decoding leaves out, by id.
        special_tokens: texts of the special tokens by role, such as "bos_token"; chat templates see them.
        chat_templates: by name; `DEFAULT_TEMPLATE` is used.
        ends: texts of the special tokens that end an answer.
        hashes: SHA-256 in hexadecimal of the vocabulary files, by file name.
        encoder: encodes a text, with or without special tokens, instead of a backend whose time and memory
            aren't known to be bounded.
        warnings: for the operator.
    """

    backend: Tokenizer
    size: int
    longest: int
    hidden: Mapping[int, str] = field(default_factory=dict)
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    ends: tuple[str, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
    encoder: Callable[[str, bool], list[int]] | None = None
    warnings: tuple[str, ...] = ()

    @property
    def chat_template(self) -> str | None:
        """The default chat template, or None."""
        return self.chat_templates.get(DEFAULT_TEMPLATE) or None

    def special_id(self, role: str) -> int | None:
        """Return the id of the special token with a role, such as "eos_token", or None."""
        token = self.special_tokens.get(role)
        return None if token is None else self.backend.token_to_id(token)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return the token ids of a text.

        Args:
            special: whether to add the special tokens that the tokenizer puts around a text.

        Raises:
            ValueError: the tokenizer fails on this text.
            TokenizerFailed: the tokenizer exceeds its limit of time or memory.
            ResourceExhausted: the tokenizer needs a worker, and none is free.
        """
        if self.encoder is not None:
            return self.encoder(text, special)
        # As a batch, even of one: only batches release the interpreter's lock.
        [encoding] = contained(lambda: self.backend.encode_batch_fast([text], add_special_tokens=special))
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text without special tokens. Raises ValueError if the tokenizer fails on these."""
        # As a batch, which releases the interpreter's lock.
        return contained(lambda: self.backend.decode_batch([list(ids)], skip_special_tokens=True))[0]


def contained(call: Callable[[], T]) -> T:
    """Call into the tokenizers library, which files from strangers can make fail on any text or token.

    Raises:
        ValueError: the library raised an exception or panicked; a panic isn't an `Exception`.
    """
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - tokenizers raises bare Exception
        raise ValueError(str(error)) from None
    except BaseException as error:
        if not is_panic(error):
            raise
        raise ValueError(f"the tokenizer panics: {error}") from None


def text_tokenizer(loaded: Any, hashes: Mapping[str, str] | None = None) -> TextTokenizer:
    """Make a `TextTokenizer` of one that transformers has loaded; nothing else may use that afterwards.

    Its files may hold settings for training: truncation, padding, and a probability of skipping merges
    (dropout). Transformers' own calls switch the first two on and off in the shared backend, so a request's
    tokens would depend on earlier requests. All three are switched off here.

    Args:
        loaded: a fast tokenizer of transformers.
        hashes: SHA-256 of the vocabulary files, by file name.

    Raises:
        ValueError: it isn't a fast tokenizer, fails on the simplest text, or drops or repeats text.
    """
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError("has no fast tokenizer (tokenizer.json)")
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None) is not None:
        backend.model.dropout = None
    templates = loaded.chat_template or {}
    tokenizer = tokenizer_of(
        backend,
        special_tokens=dict(loaded.special_tokens_map),
        chat_templates={DEFAULT_TEMPLATE: templates} if isinstance(templates, str) else dict(templates),
        hashes=hashes,
    )
    tokenizer.encode(_PROBE, special=True)
    after = backend.post_processor
    for template in () if after is None else _templates(json.loads(after.__getstate__())):
        if [piece.get("Sequence", {}).get("id") for piece in template].count("A") != 1:
            raise ValueError("its post-processor doesn't hold a text once and whole")
    return tokenizer


def tokenizer_of(
    backend: Tokenizer,
    *,
    special_tokens: Mapping[str, str],
    chat_templates: Mapping[str, str],
    hashes: Mapping[str, str] | None = None,
    encoder: Callable[[str, bool], list[int]] | None = None,
) -> TextTokenizer:
    """Make a `TextTokenizer`, whose arguments these are."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    return TextTokenizer(
        backend,
        size=max(vocabulary.values(), default=-1) + 1,
        longest=max(map(len, vocabulary), default=1),
        hidden={
            id: token.content for id, token in backend.get_added_tokens_decoder().items() if token.special
        },
        special_tokens=special_tokens,
        chat_templates=chat_templates,
        ends=named_ends(special_tokens),
        hashes=hashes or {},
        encoder=encoder,
    )


def _templates(post_processor: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Yield the templates for a single text in a post-processor, including nested ones."""
    if post_processor["type"] == "TemplateProcessing":
        yield post_processor["single"]
    for part in post_processor.get("processors", ()):
        yield from _templates(part)


def load_tokenizer(folder: str) -> TextTokenizer:
    """Load a base model's tokenizer.

    Args:
        folder: a local folder, or a hub id.

    Raises:
        OSError, ValueError: the model has no tokenizer, or it can't be served.
    """
    # Imported here because it imports torch: the workers that try adapters' tokenizers don't need that.
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    contents = {file: _read(folder, file) for file in (TOKENIZER, *VOCABULARIES)}
    hashes = {file: hashlib.sha256(content).hexdigest() for file, content in contents.items() if content}
    tokenizer = text_tokenizer(loaded, hashes)
    # transformers ignores this file if the tokens are listed elsewhere.
    special = json.loads(_read(folder, SPECIAL_TOKENS) or "{}")
    if not isinstance(special, dict):
        raise ValueError(f"{SPECIAL_TOKENS} must hold an object")
    return replace(tokenizer, ends=tuple(dict.fromkeys((*tokenizer.ends, *named_ends(special)))))


def named_ends(special_tokens: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the texts of the end tokens among a file's special tokens by role."""
    found = (special_tokens.get(role) for role in _END_ROLES)
    texts = (token.get("content") if isinstance(token, dict) else token for token in found)
    return tuple(text for text in texts if isinstance(text, str) and text)


def _read(folder: str, file: str) -> bytes | None:
    """Read a file of a tokenizer that has been loaded already; None if there is no such file."""
    path = cached_file(
        folder,
        file,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else Path(path).read_bytes()
