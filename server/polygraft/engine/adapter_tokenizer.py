"""Reads the tokenizer that an adapter's folder brings along, from its files' bytes alone."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from polygraft.adapters.folder import TOKENIZER
from polygraft.base.tokenizer import TextTokenizer, text_tokenizer
from polygraft.engine.prompt_files import CONFIG, SENTENCEPIECE, read_object
from polygraft.errors import AdapterInvalid

_CLASS = re.compile(r"[A-Za-z0-9_]+Tokenizer(Fast)?")


def read_tokenizer(name: str, files: Mapping[str, bytes]) -> TextTokenizer:
    """The tokenizer of these files, as transformers reads them.

    Nothing but the bytes that are given is read, no code in them is run, and the same bytes always give the
    same tokenizer; so one process can try what another then uses.

    Args:
        name: the adapter's, for errors.
        files: content by file name: a tokenizer.json, or a slow tokenizer's vocabulary of which `slow_class`
            knows the class; a configuration and added tokens may be beside it.

    Raises:
        AdapterInvalid: they can't be read.
    """
    # With a tokenizer.json the class itself and not Auto: it doesn't matter which class they name.
    loader = PreTrainedTokenizerFast if TOKENIZER in files else slow_class(name, files)
    what = TOKENIZER if TOKENIZER in files else "its tokenizer"
    if loader is None:
        raise AdapterInvalid(name, [f"{what} can't be read: there is no class for its files"])
    with tempfile.TemporaryDirectory(prefix="polygraft-") as aside:
        for file, content in files.items():
            (Path(aside) / file).write_bytes(content)
        try:
            return text_tokenizer(loader.from_pretrained(aside, local_files_only=True))
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the files, the load fails with it
            raise AdapterInvalid(name, [f"{what} can't be read: {error}"]) from None


def slow_class(name: str, files: Mapping[str, bytes]) -> Any:
    """The class of transformers that the configuration names for a vocabulary without tokenizer.json; None if
    it names none, or none that can be built of these files.

    Raises:
        AdapterInvalid: the configuration can't be read.
    """
    named = read_object(name, files, CONFIG).get("tokenizer_class")
    if not isinstance(named, str) or not _CLASS.fullmatch(named):
        return None
    # Here, since it imports torch, for which the process that tries a tokenizer.json has no use.
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    found = tokenizer_class_from_name(named)
    if not isinstance(found, type) or not issubclass(found, PreTrainedTokenizerFast):
        return None
    roles: dict[str, str] = getattr(found, "vocab_files_names", {})
    needed = [file for role, file in roles.items() if role != "tokenizer_file"]
    if not needed or not all(file in files and file != SENTENCEPIECE for file in needed):
        return None
    return found
