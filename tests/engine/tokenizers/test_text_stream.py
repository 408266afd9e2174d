"""Text as it streams: whole characters, and never a piece of a stop sequence."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygraft.base.tokenizer import text_tokenizer
from polygraft.engine.tokenizers.text_stream import TextStream
from tests.tiny import byte_tokenizer

FAST = byte_tokenizer()
TOKENIZER = text_tokenizer(byte_tokenizer())


def ids(text: str) -> list[int]:
    return FAST(text, add_special_tokens=False)["input_ids"]


def pieces(text: str, stop: list[str], prompt: str = "") -> tuple[list[str], str | None]:
    stream = TextStream(TOKENIZER, ids(prompt), stop)
    out = []
    for token in ids(text):
        out.append(stream.push(token))
        if stream.matched is not None:
            return out, stream.matched
    return [*out, stream.flush()], None


@pytest.mark.parametrize(
    "text", ["naïve café", "日本語の文", "👩‍👩‍👧 and 🏳️‍🌈!", "a\u0301b", "\U0001d518nicode"]
)
def test_characters_come_whole(text: str) -> None:
    out, _ = pieces(text, [])
    assert "".join(out) == text
    assert all("\ufffd" not in piece for piece in out)


def test_a_character_cut_at_the_end_stays_out() -> None:
    stream = TextStream(TOKENIZER, [], [])
    text = "".join(stream.push(token) for token in ids("ok 🙂")[:-1]) + stream.flush()
    assert text == "ok "


def test_a_prompt_that_ends_inside_a_character_does_no_harm() -> None:
    stream = TextStream(TOKENIZER, ids("🙂")[:-1], [])
    assert "".join(stream.push(token) for token in ids("abc")).endswith("bc")


def test_a_stop_sequence_across_tokens_ends_the_text_before_it() -> None:
    assert pieces("one END two", ["END"]) == (["o", "n", "e", " ", "", "", ""], "END")


def test_what_only_looked_like_a_stop_sequence_comes_out() -> None:
    out, matched = pieces("EN ENEND", ["END"])
    assert ("".join(out), matched) == ("EN EN", "END")
    out, matched = pieces("the EN", ["END"])
    assert ("".join(out), matched) == ("the EN", None)


def test_before_min_new_tokens_stop_sequences_are_text() -> None:
    stream = TextStream(TOKENIZER, [], ["b"])
    out = [stream.push(token, match=at >= 3) for at, token in enumerate(ids("abcab"))]
    assert "".join(out) == "abca"
    assert stream.matched == "b"


@given(
    st.text(alphabet="abé🙂", max_size=30),
    st.lists(st.text(alphabet="abé🙂", min_size=1, max_size=4), max_size=3),
)
@settings(deadline=None)
def test_the_text_is_cut_at_the_first_stop_sequence(text: str, stop: list[str]) -> None:
    out, matched = pieces(text, stop)
    # The first to be complete decides, as a reader of the stream sees it; of these the one that starts first.
    ends = [text.find(s) + len(s) for s in stop if s in text]
    expected = text
    if ends:
        seen = text[: min(ends)]
        expected = seen[: min(seen.find(s) for s in stop if s in seen)]
    assert "".join(out) == expected
    assert (matched is not None) == bool(ends)
    for cut in range(len(out)):
        assert expected.startswith("".join(out[:cut]))
