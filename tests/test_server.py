"""What a server that can't start leaves in its log."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from polygraft.errors import BaseModelError
from polygraft.server import failure_logged
from polygraft.telemetry.logging import configure_logging


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    root, stream = logging.getLogger(), io.StringIO()
    handlers, level = root.handlers[:], root.level
    configure_logging("info", "json", stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("polygraft").setLevel(logging.NOTSET)


@pytest.mark.parametrize("error", [BaseModelError("/nope: no such folder"), RuntimeError("a bug")])
def test_a_json_log_ends_with_why(log: io.StringIO, error: Exception) -> None:
    with pytest.raises(type(error)), failure_logged("json"):
        raise error
    record = json.loads(log.getvalue())
    assert (record["level"], record["message"]) == ("critical", f"the server ends: {error}")
    assert ("exception" in record) == isinstance(error, RuntimeError)


def test_a_readable_log_doesnt_say_it_twice(log: io.StringIO) -> None:
    with pytest.raises(BaseModelError), failure_logged("text"):
        raise BaseModelError("/nope: no such folder")
    assert log.getvalue() == ""
