"""Turns a chat's messages into the text format that a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from polygraft.engine.sandbox.template import fault_of
from polygraft.errors import ChatTemplateFailed, InvalidRequest
from polygraft_types.requests import ChatMessage


class ChatTemplate(Protocol):
    """Renders chats."""

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The text of a chat, up to where the answer begins. May be called from any thread.

        Raises:
            InvalidRequest: the template refuses these messages.
            ChatTemplateFailed: it is broken, or fails on them.
            ContextLengthExceeded: the text can't fit the context.
            ResourceExhausted: it needs a worker, and none is free.
        """


class LocalTemplate:
    """A template rendered in this process: the base's own, which is trusted like the base.

    Args:
        source: Jinja, run in transformers' sandbox.
        variables: what it may use beside the messages: the special tokens by role.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self.source = source
        self.variables = dict(variables)

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """See `ChatTemplate.render`."""
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        try:
            texts, _ = render_jinja_template(
                [conversation], chat_template=self.source, add_generation_prompt=True, **self.variables
            )
            text: str = texts[0]
            text.encode()  # an escape such as "\ud800" gives a lone surrogate, which isn't text
        except Exception as error:
            if type(error) is jinja2.TemplateError:  # what raise_exception raises
                raise InvalidRequest(
                    "chat.messages", f"the chat template of the model refuses them: {error}"
                ) from error
            fault = fault_of(error)
            raise ChatTemplateFailed("the model", fault.problem, fault.line) from error
        return text
