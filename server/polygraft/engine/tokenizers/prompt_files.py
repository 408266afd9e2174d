"""Reads the small files beside a tokenizer: chat templates, added tokens and end tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polygraft.base.tokenizer import DEFAULT_TEMPLATE, SPECIAL_TOKENS, TOKENIZER, VOCABULARIES, named_ends
from polygraft.errors import AdapterInvalid

TEMPLATE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"
ADDED_TOKENS = "added_tokens.json"
GENERATION = "generation_config.json"
_MAX_OBJECT_BYTES = 2**23
"""Limit of a settings file: parsing one holds up everybody, by some 10 ms per MiB."""
_IRRELEVANT = (
    "chat_template",
    "max_length",
    "model_max_length",
    "name_or_path",
    "padding_side",
    "truncation_side",
    "truncation_strategy",
)
"""Settings in tokenizer_config.json that affect neither encoding nor decoding here."""


def read_object(name: str, files: Mapping[str, bytes], file: str) -> dict[str, Any]:
    """A JSON file's object, empty if there is no such file.

    Args:
        name: the adapter's, for the error.

    Raises:
        AdapterInvalid: it holds anything else.
    """
    if file not in files:
        return {}
    if len(files[file]) > _MAX_OBJECT_BYTES:
        raise AdapterInvalid(name, [f"{file} has {len(files[file])} bytes, the limit is {_MAX_OBJECT_BYTES}"])
    try:
        found = json.loads(files[file])
    except (ValueError, RecursionError) as error:
        raise AdapterInvalid(name, [f"{file} can't be read: {error}"]) from None
    if not isinstance(found, dict):
        raise AdapterInvalid(name, [f"{file} must hold an object"])
    return found


def chat_template(name: str, files: Mapping[str, bytes]) -> str | None:
    """The chat template, from its own file or else from the tokenizer's configuration, which may have several
    by name. None if there is none.

    Raises:
        AdapterInvalid: it can't be read, or there are several and none is the default.
    """
    if TEMPLATE in files:
        try:
            return files[TEMPLATE].decode() or None
        except UnicodeDecodeError as error:
            raise AdapterInvalid(name, [f"{TEMPLATE} can't be read: {error}"]) from None
    found = read_object(name, files, CONFIG).get("chat_template")
    if found is None or isinstance(found, str):
        return found or None
    if not isinstance(found, list) or not all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str)
        for one in found
    ):
        problem = f"{CONFIG}: chat_template must be a text, or a list of objects with a name and a template"
        raise AdapterInvalid(name, [problem])
    templates: dict[str, str] = {one["name"]: one["template"] for one in found}
    if templates and DEFAULT_TEMPLATE not in templates:
        names = ", ".join(map(repr, sorted(templates)))[:200]
        problem = f"{CONFIG}: none of the chat templates ({names}) is named {DEFAULT_TEMPLATE!r}"
        raise AdapterInvalid(name, [problem])
    return templates.get(DEFAULT_TEMPLATE) or None


def tokenizer_files(name: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files that an adapter's tokens depend on, without settings that don't affect them.

    Raises:
        AdapterInvalid: the tokenizer's configuration can't be read.
    """
    without = (TEMPLATE, GENERATION, *(VOCABULARIES if TOKENIZER in files else ()))
    kept = {file: content for file, content in files.items() if file not in without}
    if CONFIG in kept:
        config = read_object(name, files, CONFIG)
        kept[CONFIG] = json.dumps({k: v for k, v in config.items() if k not in _IRRELEVANT}).encode()
    return kept


@dataclass(frozen=True, slots=True)
class EndTokens:
    """The end tokens that a folder names.

    Args:
        tokens: named by text: the file and the text of each.
        ids: named by id.
    """

    tokens: tuple[tuple[str, str], ...]
    ids: tuple[int, ...]


def end_tokens(name: str, files: Mapping[str, bytes]) -> EndTokens:
    """The end tokens that the files name.

    Raises:
        AdapterInvalid: a file can't be read.
    """
    tokens: list[tuple[str, str]] = []
    for file in (CONFIG, SPECIAL_TOKENS):
        tokens += [(file, token) for token in named_ends(read_object(name, files, file))]
    ids = read_object(name, files, GENERATION).get("eos_token_id")
    if ids is None:
        ids = []
    listed = ids if isinstance(ids, list) else [ids]
    if not all(type(id) is int and id >= 0 for id in listed):
        raise AdapterInvalid(name, [f"{GENERATION}: eos_token_id must be a token id or a list of them"])
    return EndTokens(tuple(tokens), tuple(listed))


def listed_tokens(name: str, files: Mapping[str, bytes]) -> dict[str, int]:
    """Ids of the added tokens that the configuration or else a slow tokenizer's file lists.

    Raises:
        AdapterInvalid: a file can't be read.
    """
    found: dict[str, int] = {}
    decoder = read_object(name, files, CONFIG).get("added_tokens_decoder")
    if decoder is None:  # transformers reads one or the other
        for token, id in read_object(name, files, ADDED_TOKENS).items():
            if type(id) is not int:
                raise AdapterInvalid(name, [f"{ADDED_TOKENS} must hold a token's id for each token"])
            found[token] = id
        return found
    try:
        for id, token in decoder.items():
            found[token["content"]] = int(id)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise AdapterInvalid(
            name, [f"{CONFIG}: added_tokens_decoder must hold an object with its content for each id"]
        ) from None
    return found
