"""Adapters that bring their own tokenizer or chat template along, and the base's for all others.

Trainers often save a tokenizer beside an adapter. Most are the base's own, and cost nothing here; one that
differs, or a chat template, is used for the requests of that adapter and of no other.
"""

from __future__ import annotations

import threading
from collections.abc import Generator

from polygraft.adapters.files.folder import AdapterFolder
from polygraft.adapters.registry import Adapter
from polygraft.adapters.stack import Stack
from polygraft.base.tokenizer import TextTokenizer
from polygraft.engine.prompts.prompts import Prompts, TextBase
from polygraft.engine.sandbox.chat_template import ChatTemplate, LocalTemplate
from polygraft.engine.sandbox.pool import Workers
from polygraft.engine.sandbox.reader import TokenizerReader
from polygraft.engine.sandbox.serving import WorkerTemplate
from polygraft.engine.sandbox.template_trials import TemplateTrials
from polygraft.engine.tokenizers.prompt_files import EndTokens, chat_template, end_tokens
from polygraft.engine.tokenizers.shared_tokenizers import SharedTokenizers
from polygraft.engine.workers.aside import aside


class AdapterPrompts:
    """The prompts of the base and of every resident adapter. May be asked from any thread."""

    def __init__(self, base: TextBase) -> None:
        self.base = Prompts.of_base(base)
        self._base = base
        self._workers = Workers()
        self._tokenizers = SharedTokenizers(base.tokenizer, TokenizerReader(base.tokenizer, self._workers))
        self._trials = TemplateTrials(self._workers)
        self._reading = threading.Lock()
        self._own: dict[int, Prompts] = {}

    def of(self, stack: Stack) -> Prompts:
        """What a request is read and answered with: what the first of its adapters brings along that brings
        any."""
        return next((self._own[g] for g in stack.generations if g in self._own), self.base)

    def reading(
        self, folder: AdapterFolder, vocabulary: int | None = None
    ) -> Generator[None, None, Prompts | None]:
        """Like `read`, as a job that doesn't block the engine's thread while a worker tries the files."""
        if not folder.texts:
            return self.read(folder, vocabulary)
        return (yield from aside(lambda: self.read(folder, vocabulary), "adapters' tokenizers"))

    def read(self, folder: AdapterFolder, vocabulary: int | None = None) -> Prompts | None:
        """What a folder brings along; None if it equals the base's. If it lacks a chat template or names no
        special tokens, those are the base's.

        A worker first reads and tries whatever isn't the base's; this waits for it.

        Args:
            vocabulary: tokens that the adapter has rows for, if not as many as the base.

        Raises:
            AdapterInvalid: a file is broken, or exceeds its limit of time or memory.
            ResourceExhausted: no worker is available.
        """
        with self._reading:
            return self._read(folder, vocabulary)

    def _read(self, folder: AdapterFolder, vocabulary: int | None) -> Prompts | None:
        base = self._base.tokenizer
        name, files = folder.name, folder.texts
        source = chat_template(name, files) or base.chat_template
        named = end_tokens(name, files)
        tokenizer = self._tokenizers.of(name, files)
        ends, warnings = _ends(named, tokenizer)
        if tokenizer.backend is not base.backend:
            warnings += tokenizer.warnings
        known = vocabulary or self._base.spec.vocabulary_size
        if tokenizer.size > known and (tokenizer.size > base.size or vocabulary is not None):
            warnings.append(
                f"its tokenizer has ids up to {tokenizer.size - 1}, and there are embeddings for {known} "
                "tokens: requests with others are refused. If it was trained with them, their rows are "
                "missing (modules_to_save, or save_embedding_layers)"
            )
        is_own = (
            tokenizer.backend is not base.backend
            or source != base.chat_template
            or any(end not in self.base.eos_token_ids for end in ends)
        )
        same = not is_own and vocabulary is None and tokenizer.special_tokens == base.special_tokens
        if same and not warnings:
            return None
        template: ChatTemplate | None = None
        if source is not None and source == base.chat_template:
            template = LocalTemplate(source, tokenizer.special_tokens)
        elif source is not None:
            most = tokenizer.longest * self._base.context_length
            variables = tokenizer.special_tokens
            warnings += self._trials.try_out(name, source, variables, most)
            template = WorkerTemplate(f"adapter {name!r}", source, variables, most, self._workers)
        return Prompts(
            tokenizer,
            template,
            vocabulary=known,
            context_length=self._base.context_length,
            eos_token_ids=(*self._base.eos_token_ids, *ends),
            is_own=is_own,
            warnings=warnings,
        )

    def add(self, adapter: Adapter, prompts: Prompts) -> None:
        """Use these for an adapter's requests."""
        self._own[adapter.generation] = prompts

    def forget(self, adapter: Adapter) -> None:
        """An adapter is gone."""
        self._own.pop(adapter.generation, None)


def _ends(named: EndTokens, tokenizer: TextTokenizer) -> tuple[list[int], list[str]]:
    """Ids of the end tokens that a folder names, and warnings about those that its tokenizer doesn't know."""
    ends, warnings = list(named.ids), []
    for file, token in named.tokens:
        id = tokenizer.backend.token_to_id(token)
        if id is None:
            warnings.append(f"{file} names {token[:50]!r} as an end, which its tokenizer doesn't know")
        else:
            ends.append(id)
    return list(dict.fromkeys(ends)), warnings
