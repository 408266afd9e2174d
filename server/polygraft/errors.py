"""Every error that Polygraft raises on purpose.

PolygraftError
├── ConfigError                  a setting is wrong; names the flag
├── MissingPackages              a command needs packages that aren't installed
├── BaseModelError               the base model can't be served
│   └── UnsupportedArchitecture  it doesn't reach attention through transformers' AttentionInterface
├── InvalidRequest               the caller's input is wrong; names the field
│   └── ContextLengthExceeded    prompt plus output don't fit the context
├── NotSupported                 in the contract, not served
├── ChatTemplateFailed           a chat template can't render a chat; names its owner and line
├── TokenizerFailed              a tokenizer can't encode a text or decode tokens
├── AdapterError                 about one adapter; names it
│   ├── AdapterNotFound
│   ├── AdapterExists            the name is taken by other content
│   ├── AdapterInvalid           the folder can't be served exactly; lists everything that is wrong
│   └── AdapterUnavailable       known, but its state forbids the call
├── ResourceExhausted            the queue, the cache or the memory is full; try again later
├── OutputUnread                 nobody reads a stream's output, so it was dropped
├── LayoutMismatch               the C++ operators were built with other structures than Python's
├── Draining                     the server is shutting down
├── Unauthenticated              no valid token where one is needed
└── EngineDead                   the engine failed; the log holds the cause
"""

from __future__ import annotations

from collections.abc import Collection

from polygraft.printable import Texts, printable

_MOST = 4096
"""Limit in characters of an error text that quotes what a caller sent."""


class PolygraftError(Exception):
    """The root of the tree. `reason` is a stable upper-case code for programs.

    Errors quote what a caller sent or a folder contains in printable form.
    """

    reason = "INTERNAL"


class ConfigError(PolygraftError):
    """A setting is wrong.

    Args:
        flag: the command line's spelling, such as `--kv-cache-bytes`.
        problem: what is wrong with its value.
    """

    reason = "CONFIG_INVALID"

    def __init__(self, flag: str, problem: str) -> None:
        super().__init__(f"{flag}: {problem}")
        self.flag = flag


class BaseModelError(PolygraftError):
    """The base model can't be loaded or can't be served."""

    reason = "BASE_MODEL_INVALID"


class UnsupportedArchitecture(BaseModelError):
    """The model doesn't send its attention through transformers' AttentionInterface."""

    reason = "ARCHITECTURE_UNSUPPORTED"


class InvalidRequest(PolygraftError):
    """The caller's input is wrong.

    Args:
        field: path of the field in the request, such as `sampling.top_p`.
        problem: what is wrong with it, with the accepted range.
    """

    reason = "INVALID_ARGUMENT"

    def __init__(self, field: str, problem: str) -> None:
        self.field = printable(field)
        self.problem = printable(problem, _MOST)
        super().__init__(f"{self.field}: {self.problem}")


class ContextLengthExceeded(InvalidRequest):
    """Virtual tokens, prompt and requested output together exceed what one sequence may hold."""

    reason = "CONTEXT_LENGTH_EXCEEDED"


class NotSupported(PolygraftError):
    """The contract names it, this server doesn't serve it.

    Args:
        field: path of the field or the method's name.
        problem: what isn't served.
    """

    reason = "NOT_SUPPORTED"

    def __init__(self, field: str, problem: str) -> None:
        self.field = printable(field)
        self.problem = printable(problem, _MOST)
        super().__init__(f"{self.field}: {self.problem}")


class ChatTemplateFailed(PolygraftError):
    """A chat template is broken, fails on a chat, or exceeds its limits.

    Args:
        whose: "the model" or "adapter 'name'".
        problem: what is wrong, a sentence's end behind a colon.
        line: of the template, counted from 1; None if unknown.
    """

    reason = "CHAT_TEMPLATE_FAILED"

    def __init__(self, whose: str, problem: str, line: int | None = None) -> None:
        where = "" if line is None else f" in line {line}"
        super().__init__(f"the chat template of {printable(whose)} fails{where}: {printable(problem, _MOST)}")
        self.whose = whose
        self.line = line


class TokenizerFailed(PolygraftError):
    """A tokenizer can't encode a text or decode tokens, or exceeds its limits.

    Args:
        problem: what is wrong, a sentence's end behind a colon.
    """

    reason = "TOKENIZER_FAILED"

    def __init__(self, problem: str) -> None:
        super().__init__(f"the tokenizer fails: {printable(problem, _MOST)}")


class AdapterError(PolygraftError):
    """About one adapter.

    Args:
        name: the adapter's name.
        problem: what is wrong.
    """

    reason = "ADAPTER_ERROR"

    def __init__(self, name: str, problem: str) -> None:
        self.name = printable(name)
        self.problem = printable(problem, _MOST)
        super().__init__(f"adapter '{self.name}': {self.problem}")


class AdapterNotFound(AdapterError):
    """No adapter (or no such generation of it) is registered under the name."""

    reason = "ADAPTER_NOT_FOUND"


class AdapterExists(AdapterError):
    """The name is registered with other content."""

    reason = "ADAPTER_EXISTS"


SHOWN_PROBLEMS = 3
"""Problems of a folder in an error's text and the log; its `problems` have more."""


class AdapterInvalid(AdapterError):
    """The folder can't be served exactly. Its text has the first problems and the number of the others.

    Args:
        name: the adapter's name.
        problems: what is wrong, one sentence each, the most telling first; never empty. Only the first are
            kept, with a count of the rest; `total` counts them all.
    """

    reason = "ADAPTER_INVALID"

    def __init__(self, name: str, problems: Collection[str]) -> None:
        assert problems
        self._texts = problems if isinstance(problems, Texts) else Texts(problems)
        self.problems = self._texts.told()
        self.total = self._texts.total
        shown = self.problems[:SHOWN_PROBLEMS]
        rest = self.total - len(shown)
        super().__init__(name, "; ".join((*shown, f"and {rest} more") if rest > 0 else shown))

    def because(self, cause: str) -> AdapterInvalid:
        """The same refusal with its probable cause as the first problem."""
        return AdapterInvalid(self.name, self._texts.with_first(cause))


class AdapterUnavailable(AdapterError):
    """Registered, but its state forbids the call (failed to load, unloading, in use)."""

    reason = "ADAPTER_UNAVAILABLE"


class ResourceExhausted(PolygraftError):
    """The queue, the cache or the memory is full.

    Args:
        problem: what is full, with the numbers.
        retry_after: seconds after which another try makes sense.
    """

    reason = "RESOURCE_EXHAUSTED"

    def __init__(self, problem: str, retry_after: float = 1.0) -> None:
        super().__init__(problem)
        self.retry_after = retry_after


class OutputUnread(PolygraftError):
    """Nobody read a stream's output, which was dropped to free its memory."""

    reason = "OUTPUT_UNREAD"


class LayoutMismatch(PolygraftError):
    """The C++ operators' structures lie in memory otherwise than Python's.

    Args:
        differing: lines "name offset size" of structures and fields that one side alone has.
    """

    def __init__(self, differing: Collection[str]) -> None:
        super().__init__(f"the C++ operators' structures differ from Python's: {'; '.join(differing)}")


class Draining(PolygraftError):
    """The server is shutting down and takes no new work."""

    reason = "DRAINING"


class Unauthenticated(PolygraftError):
    """The call needs a token and has no valid one."""

    reason = "UNAUTHENTICATED"


class EngineDead(PolygraftError):
    """The engine failed and can't go on."""

    reason = "ENGINE_DEAD"
