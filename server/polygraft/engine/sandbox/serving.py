"""Adapters' chat templates and tokenizers for requests, run in workers that can be killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from polygraft.engine.sandbox.frames import Frame
from polygraft.engine.sandbox.pool import WORKER_BYTES, Workers, key_of
from polygraft.engine.sandbox.process import WorkerStopped, WorkerUnavailable
from polygraft.errors import (
    ChatTemplateFailed,
    ContextLengthExceeded,
    InvalidRequest,
    PolygraftError,
    ResourceExhausted,
    TokenizerFailed,
)
from polygraft_types.requests import ChatMessage


class WorkerEncoder:
    """Encodes texts with a tokenizer whose time or memory isn't bounded.

    Args:
        core: the tokenizer's JSON, exactly as it was tried.
    """

    def __init__(self, core: bytes, workers: Workers) -> None:
        self._core = core
        self._key = key_of(core)
        self._workers = workers

    def __call__(self, text: str, special: bool) -> list[int]:
        """A text's ids; blocks while the worker encodes, for some seconds at most.

        Raises:
            ValueError: it fails on this text.
            TokenizerFailed: it exceeds its limit of time or memory.
            ResourceExhausted: no worker is free.
        """
        with answered(TokenizerFailed):
            found = self._workers.encode(self._key, self._core, text, special=special)
        if isinstance(found, list):
            return found
        if found.header.get("failed") == "memory":
            raise TokenizerFailed(f"it needs more than {WORKER_BYTES // 2**20} MiB of memory")
        raise ValueError(str(found.header.get("problem")))


class WorkerTemplate:
    """An adapter's own template.

    Args:
        whose: for errors: "adapter 'name'".
        source: Jinja, rendered as transformers does.
        variables: what it may use beside the messages: the special tokens by role.
        most_characters: most characters of a text that can fit the context.
    """

    def __init__(
        self, whose: str, source: str, variables: Mapping[str, str], most_characters: int, workers: Workers
    ) -> None:
        self._whose = whose
        self._source = source
        self._variables = dict(variables)
        self._most_characters = most_characters
        self._workers = workers

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """See `ChatTemplate.render`; blocks while the worker renders, for some seconds at most.

        Raises:
            InvalidRequest: the template refuses these messages.
            ChatTemplateFailed: it is broken, or exceeds its limit of time or memory.
            ContextLengthExceeded: the text can't fit the context.
            ResourceExhausted: no worker is free.
        """
        said = [{"role": message.role, "content": message.content} for message in messages]
        with answered(lambda problem: ChatTemplateFailed(self._whose, problem)):
            answer = self._workers.render(self._source, said, self._variables, self._most_characters)
            if "text" in answer.parts:
                return answer.parts["text"].decode()
        raise template_error(answer, self._whose, self._most_characters)


def template_error(answer: Frame, whose: str, most_characters: int) -> PolygraftError:
    """The request's error for a worker's answer that isn't a text."""
    problem = str(answer.header.get("problem", "it failed"))
    match answer.header.get("failed"):
        case "refusal":
            return InvalidRequest("chat.messages", f"the chat template of {whose} refuses them: {problem}")
        case "long":
            return ContextLengthExceeded(
                "chat",
                f"more than the {most_characters} characters that a context's tokens can hold come of it",
            )
        case "memory":
            return ChatTemplateFailed(whose, f"it needs more than {WORKER_BYTES // 2**20} MiB of memory")
    line = answer.header.get("line")
    return ChatTemplateFailed(whose, problem, line if isinstance(line, int) else None)


@contextmanager
def answered(failed: Callable[[str], PolygraftError]) -> Iterator[None]:
    """Turn a missing or invalid answer of a worker into the request's error.

    Args:
        failed: makes the error for a problem that is the file's fault.
    """
    try:
        yield
    except WorkerStopped as error:
        raise failed(f"it {error.problem}") from error
    except ValueError as error:
        raise failed(f"its worker sent an answer that can't be read ({error})") from error
    except WorkerUnavailable as error:
        raise ResourceExhausted(
            f"no process for adapters' chat templates and tokenizers can be started: {error}"
        ) from error
