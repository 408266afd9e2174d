"""From a chat's messages to the text that a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from polygraft.engine.request import ChatMessage
from polygraft.errors import InvalidRequest


class ChatTemplate(Protocol):
    """Renders chats."""

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The text of a chat, up to where the answer begins. May be called from any thread.

        Raises:
            InvalidRequest: the template refuses these messages.
        """


class LocalTemplate:
    """A template that is rendered in this process.

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
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise InvalidRequest(
                "chat.messages", f"the model's chat template refuses them: {error}"
            ) from error
        text: str = texts[0]
        return text
