from __future__ import annotations

import io
import json
import logging
import re
import threading
from collections.abc import Iterator
from datetime import datetime

import pytest

from polygraft.telemetry.logging import adopt_libraries, configure_logging, request_id


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("polygraft").setLevel(logging.NOTSET)


def test_a_line_says_when_how_bad_where_and_for_whom(stream: io.StringIO) -> None:
    configure_logging("info", stream=stream)
    log = logging.getLogger("polygraft.engine")
    log.info("outside")
    token = request_id.set("abc")
    log.warning("inside %d", 7)
    request_id.reset(token)
    first, second = stream.getvalue().splitlines()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO    polygraft\.engine \[-\] outside", first
    )
    assert second.endswith("WARNING polygraft.engine [abc] inside 7")


@pytest.mark.parametrize(("level", "lines"), [("debug", 3), ("info", 2), ("warning", 1), ("error", 0)])
def test_the_level_is_ours_and_libraries_warn(stream: io.StringIO, level: str, lines: int) -> None:
    configure_logging(level, stream=stream)
    for name in ("debug", "info", "warning"):
        getattr(logging.getLogger("polygraft.x"), name)("ours")
    logging.getLogger("library").info("theirs")
    assert stream.getvalue().count("ours") == lines
    assert "theirs" not in stream.getvalue()


def test_setting_up_twice_writes_each_record_once(stream: io.StringIO) -> None:
    configure_logging("info", stream=stream)
    configure_logging("info", stream=stream)
    logging.getLogger("polygraft").info("once")
    assert stream.getvalue().count("once") == 1


FORGED = "all is well\n2026-01-01 00:00:00.000 INFO    polygraft [-] forged\r\x1b[2K"


def test_what_a_record_quotes_forges_no_other(stream: io.StringIO) -> None:
    configure_logging("info", stream=stream)
    log = logging.getLogger("polygraft.engine")
    token = request_id.set(FORGED)
    log.warning("%s", FORGED)
    request_id.reset(token)
    try:
        raise ValueError(FORGED)
    except ValueError:
        log.exception("failed")
    first, second, *traceback = stream.getvalue().split("\n")
    assert first.endswith("well\\n2026-01-01 00:00:00.000 INFO    polygraft [-] forged\\r\\x1b[2K")
    assert second.endswith("failed")
    assert any("forged" in line for line in traceback)
    assert all(line.isprintable() and line.startswith("    ") for line in traceback if line)


def test_a_line_has_a_largest_length(stream: io.StringIO) -> None:
    configure_logging("info", stream=stream)
    logging.getLogger("polygraft").info("x" * 10**6)
    assert len(stream.getvalue()) < 10_000


def test_json_is_an_object_for_each_record(stream: io.StringIO) -> None:
    configure_logging("info", "json", stream)
    log = logging.getLogger("polygraft.engine")
    log.info("plain %d", 1)
    token = request_id.set("abc")
    try:
        raise ValueError(FORGED)
    except ValueError:
        log.exception("failed", extra={"fields": {"code": "INTERNAL", "total_s": 0.5}})
    request_id.reset(token)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert list(first) == ["time", "level", "logger", "message"]
    assert (first["level"], first["logger"], first["message"]) == ("info", "polygraft.engine", "plain 1")
    assert datetime.fromisoformat(first["time"]).tzinfo is not None
    assert (second["request_id"], second["code"], second["total_s"]) == ("abc", "INTERNAL", 0.5)
    assert second["exception"].startswith("Traceback")


@pytest.fixture
def printed() -> Iterator[io.StringIO]:
    """What a library's logger prints by itself, as transformers' does."""
    logger, hook, own = logging.getLogger("some_library"), threading.excepthook, io.StringIO()
    handler = logging.StreamHandler(own)
    logger.addHandler(handler)
    logger.propagate = False
    yield own
    logger.removeHandler(handler)
    logger.propagate = True
    threading.excepthook = hook


def test_libraries_print_no_text_of_their_own(stream: io.StringIO, printed: io.StringIO) -> None:
    configure_logging("info", "json", stream)
    adopt_libraries()
    logging.getLogger("some_library.part").warning("two\nlines")
    (line,) = stream.getvalue().splitlines()
    assert (json.loads(line)["logger"], json.loads(line)["level"]) == ("some_library.part", "warning")
    assert printed.getvalue() == ""


def test_a_failing_thread_is_a_record(stream: io.StringIO, printed: io.StringIO) -> None:
    configure_logging("info", "json", stream)
    adopt_libraries()
    thread = threading.Thread(target=lambda: 1 / 0, name="divider")
    thread.start()
    thread.join()
    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert record["message"] == "the thread divider failed"
    assert "ZeroDivisionError" in record["exception"]
