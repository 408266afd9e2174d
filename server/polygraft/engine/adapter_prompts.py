"""Adapters that bring their own tokenizer or chat template along, and the base's for all others.

Trainers often save a tokenizer beside an adapter. Most are the base's own, and cost nothing here; one that
differs, or a chat template, is used for the requests of that adapter and of no other.
"""

from __future__ import annotations

import json

from polygraft.adapters.folder import TOKENIZER, AdapterFolder
from polygraft.adapters.registry import Adapter
from polygraft.adapters.stack import Stack
from polygraft.base.loader import Base
from polygraft.base.tokenizer import TextTokenizer
from polygraft.engine.adapter_tokenizer import read_tokenizer
from polygraft.engine.chat_template import LocalTemplate
from polygraft.engine.prompts import Prompts
from polygraft.errors import AdapterInvalid

_TEMPLATE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"


class AdapterPrompts:
    """The prompts of the base and of every resident adapter. May be asked from any thread."""

    def __init__(self, base: Base) -> None:
        self.base = Prompts.of_base(base)
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
        base = self._base.tokenizer
        tokenizer = self._tokenizer(folder)
        self._check_size(folder.name, tokenizer or base, known)
        source = self._template(folder) or base.chat_template
        if tokenizer is None and source == base.chat_template and vocabulary is None:
            return None
        used = tokenizer or base
        own = used.special_id("eos_token")
        return Prompts(
            used,
            None if source is None else LocalTemplate(source, used.special_tokens),
            vocabulary=known,
            context_length=self._base.context_length,
            eos_token_ids=(*self._base.eos_token_ids, *(() if own is None else (own,))),
            is_own=tokenizer is not None or source != base.chat_template,
        )

    def add(self, adapter: Adapter, prompts: Prompts) -> None:
        """Use these for an adapter's requests."""
        self._own[adapter.generation] = prompts

    def forget(self, adapter: Adapter) -> None:
        """An adapter is gone."""
        self._own.pop(adapter.generation, None)

    def _tokenizer(self, folder: AdapterFolder) -> TextTokenizer | None:
        if TOKENIZER not in folder.texts:
            return None
        tokenizer = read_tokenizer(folder.name, folder.texts)
        if tokenizer.backend.to_str() == self._base.tokenizer.backend.to_str():
            return None
        return tokenizer

    @staticmethod
    def _check_size(name: str, tokenizer: TextTokenizer, vocabulary: int) -> None:
        if tokenizer.size > vocabulary:
            raise AdapterInvalid(
                name,
                [
                    f"its tokenizer has ids up to {tokenizer.size - 1}, and there are embeddings for "
                    f"{vocabulary} tokens: the rows of added ones are to be saved with the adapter "
                    "(modules_to_save, or save_embedding_layers)"
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
