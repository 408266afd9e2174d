"""From what a caller sends to token ids, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2
from tokenizers import Tokenizer

from polygraft.base.loader import Base
from polygraft.engine.logprobs import TokenTexts
from polygraft.engine.request import Chat
from polygraft.engine.text_stream import TextStream
from polygraft.errors import ContextLengthExceeded, InvalidRequest


class Prompts:
    """A tokenizer and a chat template: the base model's, or those that an adapter brings along. Thread-safe,
    since a tokenizer's calls are.

    Args:
        tokenizer: transformers' fast tokenizer; None is the base's own.
        chat_template: instead of the tokenizer's.
        vocabulary: tokens that there are rows for; None is as many as the base has.
    """

    def __init__(
        self,
        base: Base,
        tokenizer: Any = None,
        chat_template: str | None = None,
        vocabulary: int | None = None,
    ) -> None:
        self.is_own = tokenizer is not None or chat_template is not None
        """Whether anything but the number of tokens is an adapter's."""
        self._tokenizer = base.tokenizer if tokenizer is None else tokenizer
        self._template = chat_template
        self._backend: Tokenizer = base.backend if tokenizer is None else tokenizer.backend_tokenizer
        self._vocabulary = vocabulary or base.spec.vocabulary_size
        self._context_length = base.context_length
        longest = max(map(len, self._backend.get_vocab()), default=1)
        self._most_characters = longest * base.context_length
        self._eos = base.eos_token_ids
        if tokenizer is not None and tokenizer.eos_token_id is not None:
            self._eos = tuple(dict.fromkeys((*base.eos_token_ids, int(tokenizer.eos_token_id))))
        self.texts = TokenTexts(self._backend)

    @property
    def has_chat_template(self) -> bool:
        """Whether chats can be rendered."""
        return bool(self._template or getattr(self._tokenizer, "chat_template", None))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """What ends an answer: the model's own, and its tokenizer's if that is an adapter's."""
        return self._eos

    def text_stream(self, prompt_ids: Sequence[int], stop: Sequence[str]) -> TextStream:
        """Turns what comes behind a prompt into text."""
        return TextStream(self._backend, prompt_ids, stop)

    def token_ids(self, prompt: str | tuple[int, ...] | Chat) -> Sequence[int]:
        """Token ids of a prompt: text with the model's own special tokens, ids as they are, a chat
        through the template with the start of the answer.

        Raises:
            InvalidRequest: empty, out of range, or not for the template.
        """
        if isinstance(prompt, tuple):
            self.check_ids(prompt, "token_ids.ids")
            ids: Sequence[int] = prompt
            field = "token_ids.ids"
        elif isinstance(prompt, Chat):
            # The template writes the special tokens itself.
            text = self._render(prompt)
            self._check_characters(text, "chat")
            ids = self._encode(text, False)
            field = "chat"
        else:
            if not prompt:
                raise InvalidRequest("prompt", "must not be empty")
            self._check_characters(prompt, "prompt")
            ids = self._encode(prompt, True)
            field = "prompt"
        if not ids:
            raise InvalidRequest(field, "must not be empty")
        return ids

    def pairs(
        self, prompt: str | tuple[int, ...] | Chat, continuations: Sequence[str | tuple[int, ...]]
    ) -> list[tuple[Sequence[int], Sequence[int]]]:
        """Token ids of a prompt and of each of its continuations, none of them empty.

        As lm-evaluation-harness does it, so that scores compare: text is tokenized together with the
        continuation, and what is longer than the prompt's own tokens is the continuation's; white space at
        the prompt's end goes to the continuations, since a token often begins with it; the beginning (or
        end) of sequence stands for an empty prompt. A chat's template ends as it should, and keeps its end.

        Raises:
            InvalidRequest: as `token_ids`, or a continuation adds no token.
            ContextLengthExceeded: the prompt alone is too long.
        """
        found: list[tuple[Sequence[int], Sequence[int]]] = []
        text = moved = ""
        special = not isinstance(prompt, Chat)
        if isinstance(prompt, tuple) or not any(isinstance(c, str) for c in continuations):
            context = self.token_ids(prompt) if prompt else self._beginning()
        else:
            whole = self._render(prompt) if isinstance(prompt, Chat) else prompt
            self._check_characters(whole, "prompt")
            text = whole.rstrip() if special else whole
            moved = whole[len(text) :]
            context = self._encode(text, special) if text else ()
        if len(context) > self._context_length:
            raise ContextLengthExceeded(
                "prompt", f"{len(context)} tokens, the context holds {self._context_length}"
            )
        for at, continuation in enumerate(continuations):
            field = f"continuations[{at}]"
            ids: Sequence[int]
            if isinstance(continuation, tuple):
                self.check_ids(continuation, f"continuation_token_ids[{at}].ids")
                ids = continuation
            elif isinstance(prompt, tuple) or not context:
                self._check_characters(continuation, field)
                ids = self._encode(moved + continuation, False)
            else:
                self._check_characters(continuation, field)
                ids = self._encode(text + moved + continuation, special)[len(context) :]
            if not ids:
                raise InvalidRequest(field, "adds no token to the prompt")
            found.append((context or self._beginning(), ids))
        return found

    def _encode(self, text: str, special: bool) -> list[int]:
        if special:
            ids: list[int] = self._tokenizer(text)["input_ids"]
            return ids
        return self._backend.encode(text, add_special_tokens=False).ids

    def _beginning(self) -> Sequence[int]:
        """What stands for an empty prompt; raises InvalidRequest if the model has no such token."""
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return (int(token),)
        raise InvalidRequest("prompt", "must not be empty: the model has no token for a beginning")

    def _check_characters(self, text: str, field: str) -> None:
        """Refuse what can't fit whatever its tokens are, before seconds go into tokenizing it."""
        if len(text) > self._most_characters:
            raise ContextLengthExceeded(
                field,
                f"{len(text)} characters are more than a context's tokens can hold ({self._most_characters})",
            )

    def _render(self, chat: Chat) -> str:
        if not self.has_chat_template:
            raise InvalidRequest("chat", "the model has no chat template; send a prompt")
        if not chat.messages:
            raise InvalidRequest("chat.messages", "must not be empty")
        messages = [{"role": message.role, "content": message.content} for message in chat.messages]
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, add_generation_prompt=True
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise InvalidRequest(
                "chat.messages", f"the model's chat template refuses them: {error}"
            ) from error
        return text

    def check_ids(self, ids: Sequence[int], field: str) -> None:
        """Raise InvalidRequest for an id outside the vocabulary."""
        for at, token in enumerate(ids):
            if not 0 <= token < self._vocabulary:
                raise InvalidRequest(f"{field}[{at}]", f"must be in [0, {self._vocabulary}), got {token}")

    def check_biased(self, ids: Sequence[int]) -> None:
        """Raise InvalidRequest for an id of a logit bias that is outside the vocabulary."""
        for token in ids:
            if not 0 <= token < self._vocabulary:
                field = f"sampling.logit_bias[{token}]"
                raise InvalidRequest(field, f"the token id must be in [0, {self._vocabulary})")

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens. Raises InvalidRequest for an id outside the vocabulary."""
        self.check_ids(ids, "token_ids")
        return self._backend.decode(list(ids), skip_special_tokens=True)
