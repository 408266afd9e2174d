"""Renders chats as transformers does, in a worker, and reports errors with the template's line.

The environment is that of transformers' `apply_chat_template` (utils/chat_template_utils.py), rebuilt here
because importing transformers takes a second and 60 MB. Tests keep the two alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from types import TracebackType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from polygraft.printable import printable


class Refusal(jinja2.TemplateError):
    """The template rejected these messages by `raise_exception`."""


class TemplateFault(Exception):
    """The template is broken, or fails on these messages.

    Args:
        problem: one line.
        line: of the template, counted from 1; None if unknown.
        broken: whether it can't render any chat.
    """

    def __init__(self, problem: str, line: int | None, *, broken: bool = False) -> None:
        super().__init__(problem)
        self.problem = problem
        self.line = line
        self.broken = broken


class TooLong(Exception):
    """The text is longer than allowed."""


def render(
    source: str, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any], most_characters: int
) -> str:
    """The text of a chat, up to where the answer begins.

    Args:
        messages: each with role and content.
        variables: what the template may use beside them: the special tokens by role.
        most_characters: limit of the text.

    Raises:
        Refusal, TemplateFault, TooLong: see there.
        MemoryError: it needs more than there is.
    """
    found = {
        **variables,
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
    }
    try:
        template = compiled(source)
    except MemoryError:
        raise
    except Exception as error:
        fault = fault_of(error)
        raise TemplateFault(fault.problem, fault.line, broken=True) from error
    pieces: list[str] = []
    left = most_characters
    try:
        for piece in template.generate(found):
            left -= len(piece)
            if left < 0:
                raise TooLong
            pieces.append(piece)
        text = "".join(pieces)
        text.encode()  # an escape such as "\ud800" gives a lone surrogate, which isn't text
    except (Refusal, TooLong, MemoryError):
        raise
    except Exception as error:
        raise fault_of(error) from error
    return text


def fault_of(error: Exception) -> TemplateFault:
    """The fault for an exception from a template, with the line that it came from."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return TemplateFault(printable(error.message or "it isn't Jinja"), error.lineno)
    return TemplateFault(printable(f"{type(error).__name__}: {error}"), _line_of(error.__traceback__))


def _line_of(traceback: TracebackType | None) -> int | None:
    """The template's line that an error came from: Jinja gives its frames the template's line numbers."""
    line = None
    while traceback is not None:
        if "__jinja_exception__" in traceback.tb_frame.f_globals:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


@lru_cache(maxsize=32)
def compiled(source: str) -> jinja2.Template:
    """A template, ready to render. Raises whatever Jinja and Python's compiler do."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment.from_string(source)


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's text for trainers; here it just renders its content."""

    tags = {"generation"}  # noqa: RUF012 - as in Jinja's own extensions

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise_exception(message: str) -> NoReturn:
    raise Refusal(message)


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike Jinja's own, it doesn't escape for HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:  # noqa: A002 - as transformers calls it
    return datetime.now().strftime(format)


class _Dict:
    """`dict` for templates: makes dictionaries, and exposes nothing else of the type."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **values)


class _Namespace(Namespace):
    """`namespace` for templates, without attributes that begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:
        self, args = args[0], args[1:]
        attributes = dict(*args, **values)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        Namespace.__setitem__(self, name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"Chat templates cannot store underscore-prefixed attributes on a namespace, but got {name!r}. "
            "Please rename the attribute."
        )
