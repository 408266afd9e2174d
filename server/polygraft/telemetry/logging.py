"""How the process logs: a line for each record, readable or JSON, with the id of its request."""

from __future__ import annotations

import json
import logging
import sys
import threading
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

from polygraft.printable import printable

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""The id of the call that the current task serves; "-" outside of any."""

_MOST = 8192
"""Limit of a line, in characters."""
_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s [%(request_id)s] %(message)s"


class _OneLine(logging.Formatter):
    """Keeps quoted text from forging log lines: a message is one line, a traceback's lines are indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line, with unprintable characters escaped."""
        return printable(super().formatMessage(record), _MOST)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        """The traceback, indented."""
        lines = super().formatException(ei).splitlines()
        return "\n".join(f"    {printable(line, _MOST)}" for line in lines)


class _Json(logging.Formatter):
    """A JSON object for each record, tracebacks included. A record's `fields` become keys of it."""

    def format(self, record: logging.LogRecord) -> str:
        """The object, in one line."""
        shown: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": printable(record.getMessage(), _MOST),
        }
        if (call := getattr(record, "request_id", "-")) != "-":
            shown["request_id"] = call
        shown |= getattr(record, "fields", {})
        if record.exc_info:
            shown["exception"] = self.formatException(record.exc_info)[-_MOST:]
        return json.dumps(shown, default=str)


class _RequestIdFilter(logging.Filter):
    """Puts the current request's id into every record."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


def configure_logging(level: str, form: str = "text", stream: TextIO | None = None) -> None:
    """Send the process's records to `stream` (default: standard error), replacing earlier handlers.

    Args:
        level: "debug", "info", "warning" or "error" for Polygraft; libraries log from "warning" on.
        form: "text" or "json".
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(_Json() if form == "json" else _OneLine(_FORMAT, datefmt="%Y-%m-%d %H:%M:%S"))
    handler.addFilter(_RequestIdFilter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("polygraft").setLevel(level.upper())


def adopt_libraries() -> None:
    """Send libraries' records, and the tracebacks of failed threads, through this process's own handler.

    Some libraries give their logger a handler of its own (transformers, huggingface_hub, torch), which prints
    raw text, even beside JSON. Call it once they are imported.
    """
    for logger in list(logging.root.manager.loggerDict.values()):
        if not isinstance(logger, logging.Logger):
            continue
        # Only the plain class: subclasses write elsewhere, such as torch's traces.
        consoles = [handler for handler in logger.handlers if type(handler) is logging.StreamHandler]
        for handler in consoles:
            logger.removeHandler(handler)
        if consoles:
            logger.propagate = True
    threading.excepthook = _log_failed_thread


def _log_failed_thread(failure: threading.ExceptHookArgs) -> None:
    if failure.exc_type is SystemExit or failure.exc_value is None:
        return
    name = failure.thread.name if failure.thread is not None else "of an unknown name"
    trace = (failure.exc_type, failure.exc_value, failure.exc_traceback)
    logging.getLogger("polygraft.threads").error("the thread %s failed", name, exc_info=trace)
