"""Adapters that bring their own tokenizer or chat template along, and the base's for all others.

Trainers often save a tokenizer beside an adapter. Most are the base's own, and cost nothing here; one that
differs, or a chat template, is used for the requests of that adapter and of no other.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from polygraft.adapters.folder import TOKENIZER, AdapterFolder
from polygraft.adapters.registry import Adapter
from polygraft.adapters.stack import Stack
from polygraft.base.loader import Base
from polygraft.engine.prompts import Prompts
from polygraft.errors import AdapterInvalid

_TEMPLATE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"


class AdapterPrompts:
    """The prompts of the base and of every resident adapter. May be asked from any thread."""

    def __init__(self, base: Base) -> None:
        self.base = Prompts(base)
        self._base = base
        self._own: dict[int, Prompts] = {}

    def of(self, stack: Stack) -> Prompts:
        """What a request is read and answered with: what the first of its adapters brings along that brings
        any."""
        return next((self._own[g] for g in stack.generations if g in self._own), self.base)

    def read(self, folder: AdapterFolder, vocabulary: int | None = None) -> Prompts | None:
        """What a folder brings along; None if that is the base's own.

        Args:
            vocabulary: tokens that the adapter has rows for, if not as many as the base.

        Raises:
            AdapterInvalid: a file is broken, or there are more tokens than rows for them.
        """
        known = vocabulary or self._base.spec.vocabulary_size
        tokenizer = self._tokenizer(folder, known)
        if tokenizer is None and vocabulary is not None:
            self._check_size(folder.name, self._base.backend, known, "the base's tokenizer")
        template = self._template(folder)
        if tokenizer is None and template == self._base.tokenizer.chat_template:
            template = None
        if tokenizer is None and template is None and vocabulary is None:
            return None
        return Prompts(self._base, tokenizer, template, vocabulary)

    def add(self, adapter: Adapter, prompts: Prompts) -> None:
        """Use these for an adapter's requests."""
        self._own[adapter.generation] = prompts

    def forget(self, adapter: Adapter) -> None:
        """An adapter is gone."""
        self._own.pop(adapter.generation, None)

    def _tokenizer(self, folder: AdapterFolder, vocabulary: int) -> Any:
        content = folder.texts.get(TOKENIZER)
        if content is None:
            return None
        try:
            backend = Tokenizer.from_str(content.decode())
        except Exception as error:  # noqa: BLE001 - tokenizers raises bare Exception
            raise AdapterInvalid(folder.name, [f"{TOKENIZER} can't be read: {error}"]) from None
        if backend.to_str() == self._base.backend.to_str():
            return None
        self._check_size(folder.name, backend, vocabulary, TOKENIZER)
        with tempfile.TemporaryDirectory(prefix="polygraft-") as aside:
            for file, text in folder.texts.items():
                (Path(aside) / file).write_bytes(text)
            try:
                # The class itself and not Auto: what the files name as their class isn't looked for.
                return PreTrainedTokenizerFast.from_pretrained(aside, local_files_only=True)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with the files, the load fails with it
                raise AdapterInvalid(folder.name, [f"its tokenizer can't be loaded: {error}"]) from None

    @staticmethod
    def _check_size(name: str, backend: Tokenizer, vocabulary: int, whose: str) -> None:
        size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if size > vocabulary:
            raise AdapterInvalid(
                name,
                [
                    f"{whose} has ids up to {size - 1}, and there are embeddings for {vocabulary} tokens: "
                    "the rows of added ones are to be saved with the adapter (modules_to_save, or "
                    "save_embedding_layers)"
                ],
            )

    @staticmethod
    def _template(folder: AdapterFolder) -> str | None:
        """The chat template, from its own file or from the tokenizer's configuration."""
        try:
            if _TEMPLATE in folder.texts:
                return folder.texts[_TEMPLATE].decode()
            config = json.loads(folder.texts.get(_CONFIG, b"{}"))
        except (ValueError, RecursionError) as error:
            raise AdapterInvalid(folder.name, [f"{_CONFIG} or {_TEMPLATE} can't be read: {error}"]) from None
        template = config.get("chat_template") if isinstance(config, dict) else None
        if template is not None and not isinstance(template, str):
            raise AdapterInvalid(folder.name, [f"{_CONFIG}: several chat templates aren't served, keep one"])
        return template
