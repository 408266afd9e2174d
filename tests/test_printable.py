"""What strangers send is shown in one line, in part if it is long."""

from __future__ import annotations

import pytest

from polygraft.errors import AdapterInvalid, AdapterNotFound, InvalidRequest
from polygraft.printable import MAX_CHARACTERS, MAX_TEXTS, Texts, printable, printable_texts

FORGED = "x\n2026-01-01 00:00:00.000 INFO    polygraft all is well\r\x1b[2K\u202e\u2028\udc80"


@pytest.mark.parametrize("text", ["", "plain", "é 漢字 'quoted' \\d+", "x" * MAX_CHARACTERS])
def test_what_can_be_printed_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


def test_what_cant_be_printed_is_escaped() -> None:
    assert printable(FORGED) == (
        "x\\n2026-01-01 00:00:00.000 INFO    polygraft all is well\\r\\x1b[2K\\u202e\\u2028\\udc80"
    )


def test_what_is_long_is_cut_after_it_is_escaped() -> None:
    assert len(printable("\n" * 10**6, 100)) == 100
    assert printable("x" * 101, 100) == "x" * 97 + "..."


def test_many_texts_are_counted() -> None:
    texts = Texts(["a\nb"])
    texts.append("c")
    texts += [str(n) for n in range(60_000)]
    assert texts[:3] == ["a\\nb", "c", "0"]
    assert len(texts) == MAX_TEXTS
    assert texts.told()[-1] == f"and {60_002 - MAX_TEXTS} more"
    assert printable_texts(["a"]) == ("a",)


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest(FORGED, FORGED),
        AdapterNotFound(FORGED, FORGED),
        AdapterInvalid(FORGED, [FORGED]),
        AdapterInvalid("a", [FORGED * 1000] * 10_000),
    ],
)
def test_errors_are_one_line_of_bounded_length(error: Exception) -> None:
    assert str(error).isprintable()
    assert len(str(error)) < 5000
