"""How the process logs: one readable line a record, with the id of the request it belongs to."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar
from typing import TextIO

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""The id of the call that the current task serves; "-" outside of any."""

_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s [%(request_id)s] %(message)s"


class _RequestIdFilter(logging.Filter):
    """Puts the current request's id into every record."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


def configure_logging(level: str, stream: TextIO | None = None) -> None:
    """Send the process's records to `stream` (default: standard error), replacing earlier handlers.

    `level` ("debug", "info", "warning" or "error") holds for Polygraft; libraries are heard from
    "warning" on.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%Y-%m-%d %H:%M:%S"))
    handler.addFilter(_RequestIdFilter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("polygraft").setLevel(level.upper())
