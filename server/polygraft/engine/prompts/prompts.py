"""From what a caller sends to token ids, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from polygraft.base.tokenizer import TextTokenizer
from polygraft.core.spec import BaseSpec
from polygraft.engine.sampling.logprobs import TokenTexts
from polygraft.engine.sandbox.chat_template import ChatTemplate, LocalTemplate
from polygraft.engine.tokenizers.text_stream import TextStream
from polygraft.errors import ContextLengthExceeded, InvalidRequest
from polygraft_types.requests import Chat


class TextBase(Protocol):
    """What reading and answering needs of a base model; its weights aren't part of it."""

    @property
    def tokenizer(self) -> TextTokenizer:
        """Its tokenizer."""

    @property
    def spec(self) -> BaseSpec:
        """Its names and shapes."""

    @property
    def context_length(self) -> int:
        """Most tokens of a request."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """What ends an answer."""


class Prompts:
    """A tokenizer and a chat template: the base model's, or those that an adapter brings along. Thread-safe,
    since nothing here changes.

    Args:
        template: None if there is none.
        vocabulary: number of tokens with an embedding.
        context_length: most tokens of a request.
        eos_token_ids: end tokens; those without an embedding are dropped.
        is_own: whether anything but the vocabulary's size is an adapter's.
        warnings: what an operator should know.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        template: ChatTemplate | None,
        *,
        vocabulary: int,
        context_length: int,
        eos_token_ids: Sequence[int],
        is_own: bool = False,
        warnings: Sequence[str] = (),
    ) -> None:
        self.is_own = is_own
        self.warnings = tuple(warnings)
        self._tokenizer = tokenizer
        self._template = template
        self.vocabulary = vocabulary
        """Number of tokens with an embedding."""
        self._context_length = context_length
        self._most_characters = tokenizer.longest * context_length
        self._eos = tuple(dict.fromkeys(token for token in eos_token_ids if 0 <= token < vocabulary))
        self.texts = TokenTexts(tokenizer)

    @classmethod
    def of_base(cls, base: TextBase) -> Prompts:
        """The base model's own."""
        tokenizer = base.tokenizer
        source = tokenizer.chat_template
        return cls(
            tokenizer,
            None if source is None else LocalTemplate(source, tokenizer.special_tokens),
            vocabulary=base.spec.vocabulary_size,
            context_length=base.context_length,
            eos_token_ids=base.eos_token_ids,
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether chats can be rendered."""
        return self._template is not None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End tokens: the model's own, and those that an adapter's folder names."""
        return self._eos

    def text_stream(self, prompt_ids: Sequence[int], stop: Sequence[str]) -> TextStream:
        """Turns what comes behind a prompt into text."""
        return TextStream(self._tokenizer, prompt_ids, stop)

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
            ids = self._encode(text, "chat", special=False)
            field = "chat"
        else:
            if not prompt:
                raise InvalidRequest("prompt", "must not be empty")
            self._check_characters(prompt, "prompt")
            ids = self._encode(prompt, "prompt", special=True)
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
            context = self._encode(text, "prompt", special=special) if text else ()
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
                ids = self._encode(moved + continuation, field, special=False)
            else:
                self._check_characters(continuation, field)
                ids = self._encode(text + moved + continuation, field, special=special)[len(context) :]
            if not ids:
                raise InvalidRequest(field, "adds no token to the prompt")
            found.append((context or self._beginning(), ids))
        return found

    def _encode(self, text: str, field: str, *, special: bool) -> list[int]:
        """See `TextTokenizer.encode`. Raises InvalidRequest where it fails, or a token has no embedding."""
        try:
            ids = self._tokenizer.encode(text, special=special)
        except ValueError as error:
            raise InvalidRequest(field, f"the tokenizer fails on it: {error}") from None
        if self._tokenizer.size > self.vocabulary and ids and max(ids) >= self.vocabulary:
            token = next(token for token in ids if token >= self.vocabulary)
            raise InvalidRequest(
                field,
                f"holds the token {self.texts(token)!r} of id {token}, and there are embeddings for "
                f"[0, {self.vocabulary}) alone",
            )
        return ids

    def _beginning(self) -> Sequence[int]:
        """What stands for an empty prompt; raises InvalidRequest if the model has no such token."""
        for role in ("bos_token", "eos_token"):
            token = self._tokenizer.special_id(role)
            if token is not None and token < self.vocabulary:
                return (token,)
        raise InvalidRequest("prompt", "must not be empty: the model has no token for a beginning")

    def _check_characters(self, text: str, field: str) -> None:
        """Refuse what can't fit whatever its tokens are, before seconds go into tokenizing it."""
        if len(text) > self._most_characters:
            raise ContextLengthExceeded(
                field,
                f"{len(text)} characters are more than a context's tokens can hold ({self._most_characters})",
            )

    def _render(self, chat: Chat) -> str:
        if self._template is None:
            raise InvalidRequest("chat", "the model has no chat template; send a prompt")
        if not chat.messages:
            raise InvalidRequest("chat.messages", "must not be empty")
        return self._template.render(chat.messages)

    def check_ids(self, ids: Sequence[int], field: str) -> None:
        """Raise InvalidRequest for an id outside the vocabulary."""
        if not ids or (min(ids) >= 0 and max(ids) < self.vocabulary):
            return
        for at, token in enumerate(ids):
            if not 0 <= token < self.vocabulary:
                raise InvalidRequest(f"{field}[{at}]", f"must be in [0, {self.vocabulary}), got {token}")

    def check_biased(self, ids: Sequence[int]) -> None:
        """Raise InvalidRequest for an id of a logit bias that is outside the vocabulary."""
        for token in ids:
            if not 0 <= token < self.vocabulary:
                field = f"sampling.logit_bias[{token}]"
                raise InvalidRequest(field, f"the token id must be in [0, {self.vocabulary})")

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens. Raises InvalidRequest for an id outside the vocabulary, or if the
        tokenizer fails on these tokens."""
        self.check_ids(ids, "token_ids")
        try:
            return self._tokenizer.decode(ids)
        except ValueError as error:
            raise InvalidRequest("token_ids", f"the tokenizer fails on them: {error}") from None
