"""Reads an adapter's tokenizer from nothing but its files' bytes."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from polygraft.base.tokenizer import OPAQUE, SENTENCEPIECE, TOKENIZER, TextTokenizer, text_tokenizer
from polygraft.engine.tokenizers.prompt_files import CONFIG, read_object
from polygraft.errors import AdapterInvalid

_CLASS = re.compile(r"[A-Za-z0-9_]+Tokenizer(Fast)?")


def read_tokenizer(name: str, files: Mapping[str, bytes]) -> TextTokenizer:
    """The tokenizer of these files, as transformers reads them.

    It reads only the given bytes and runs no code in them, and the same bytes always give the same tokenizer.
    So one process can try what another then uses.

    Args:
        name: the adapter's, for errors.
        files: content by file name: a tokenizer.json, or a slow tokenizer's vocabulary for which `slow_class`
            finds a class; possibly a configuration and added tokens too.

    Raises:
        AdapterInvalid: they can't be read.
    """
    # With a tokenizer.json, this class and not AutoTokenizer: which class the files name doesn't matter.
    loader = PreTrainedTokenizerFast if TOKENIZER in files else slow_class(name, files)
    what = TOKENIZER if TOKENIZER in files else "its tokenizer"
    if loader is None:
        raise AdapterInvalid(name, [f"{what} can't be read: there is no class for its files"])
    with tempfile.TemporaryDirectory(prefix="polygraft-") as aside:
        for file, content in files.items():
            (Path(aside) / file).write_bytes(content)
        try:
            return text_tokenizer(loader.from_pretrained(aside, local_files_only=True))
        except Exception as error:  # noqa: BLE001 - any error of the files fails the load
            raise AdapterInvalid(name, [f"{what} can't be read: {error}"]) from None


def slow_class(name: str, files: Mapping[str, bytes]) -> Any:
    """The class of transformers that the configuration names for a vocabulary without tokenizer.json; None if
    it names none, or one that can't be built from these files.

    Raises:
        AdapterInvalid: the configuration can't be read.
    """
    named = read_object(name, files, CONFIG).get("tokenizer_class")
    if not isinstance(named, str) or not _CLASS.fullmatch(named):
        return None
    # Imported here because it imports torch, which a worker that tries a tokenizer.json doesn't need.
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    found = tokenizer_class_from_name(named)
    if not isinstance(found, type) or not issubclass(found, PreTrainedTokenizerFast):
        return None
    roles: dict[str, str] = getattr(found, "vocab_files_names", {})
    needed = [file for role, file in roles.items() if role != "tokenizer_file"]
    unread = (*SENTENCEPIECE, *OPAQUE)
    if not needed or not all(file in files and file not in unread for file in needed):
        return None
    return found
