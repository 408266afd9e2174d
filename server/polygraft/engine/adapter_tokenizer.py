"""Reads the tokenizer that an adapter's folder brings along, from its files' bytes alone."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from polygraft.adapters.folder import TOKENIZER
from polygraft.base.tokenizer import TextTokenizer, text_tokenizer
from polygraft.errors import AdapterInvalid


def read_tokenizer(name: str, files: Mapping[str, bytes]) -> TextTokenizer:
    """The tokenizer and the chat templates of these files, as transformers reads them.

    Nothing but the bytes that are given is read, no code in them is run, and the same bytes always give the
    same tokenizer; so one process can try what another then uses.

    Args:
        name: the adapter's, for errors.
        files: content by file name, with a tokenizer.json.

    Raises:
        AdapterInvalid: they can't be read.
    """
    try:
        Tokenizer.from_str(files[TOKENIZER].decode())
    except Exception as error:  # noqa: BLE001 - tokenizers raises bare Exception
        raise AdapterInvalid(name, [f"{TOKENIZER} can't be read: {error}"]) from None
    with tempfile.TemporaryDirectory(prefix="polygraft-") as aside:
        for file, content in files.items():
            (Path(aside) / file).write_bytes(content)
        try:
            # The class itself and not Auto: what the files name as their class isn't looked for.
            return text_tokenizer(PreTrainedTokenizerFast.from_pretrained(aside, local_files_only=True))
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the files, the load fails with it
            raise AdapterInvalid(name, [f"its tokenizer can't be loaded: {error}"]) from None
