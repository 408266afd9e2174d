"""Stop sequences with special tokens in them, which are no part of an answer's text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygraft.base.tokenizer import text_tokenizer
from polygraft.engine.engine import Engine
from polygraft.engine.tokenizers.stop_sequences import StopSequences
from polygraft.engine.tokenizers.text_stream import TextStream
from polygraft_types.answers import Finished, FinishReason
from polygraft_types.requests import AdapterRef, Request, SamplingParams, StoppingParams
from tests.engines import make_engine
from tests.tiny import EOS, byte_tokenizer

END, CALL = 258, 259
SPECIALS = ["<|im_end|>", "<call>"]


def tokenizer_with_specials() -> object:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": SPECIALS})
    assert tokenizer.convert_tokens_to_ids("<call>") == CALL
    return tokenizer


TOKENIZER = text_tokenizer(tokenizer_with_specials())


def streamed(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """What comes of a text in which special tokens are written out."""
    stream = TextStream(TOKENIZER, [], stop)
    out = ""
    for token in TOKENIZER.encode(text, special=False):
        out += stream.push(token)
        if stream.matched is not None:
            return out, stream.matched
    return out + stream.flush(), None


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("ab<|im_end|>cd", ["<|im_end|>"], ("ab", "<|im_end|>")),
        ("ab<|im_end|>\ncd", ["<|im_end|>\n"], ("ab", "<|im_end|>\n")),
        ("ab<|im_end|>cd", ["<|im_end|>\n"], ("abcd", None)),
        ("ab\n\n<|im_end|>", ["\n<|im_end|>"], ("ab\n", "\n<|im_end|>")),
        ("ab\nc", ["\n<|im_end|>"], ("ab\nc", None)),
        ("a<call><|im_end|>b", ["<call><|im_end|>"], ("a", "<call><|im_end|>")),
        ("a<call><call><|im_end|>b", ["<call><|im_end|>"], ("a", "<call><|im_end|>")),
        ("a<call>x<|im_end|>", ["<call>x<|im_end|>"], ("a", "<call>x<|im_end|>")),
        ("a<call>y<|im_end|>", ["<call>x<|im_end|>"], ("ay", None)),
        ("a<call>é<|im_end|>", ["<call>é<|im_end|>"], ("a", "<call>é<|im_end|>")),
        # Spelled by ordinary tokens it is text.
        ("a<|im_", ["<|im_end|>"], ("a<|im_", None)),
        # A part of a special token is none, though it looks like one.
        ("a<|im_end|>b", ["im_end"], ("ab", None)),
        ("a<|im_end|>b", ["<"], ("ab", None)),
        ("a<call>b", ["<call>b", "b"], ("a", "<call>b")),
        # Special tokens are no part of the text that other stop sequences are looked for in.
        ("a<call>b", ["ab"], ("", "ab")),
        ("a<call>b", ["ab", "<|im_end|>"], ("", "ab")),
        ("xa<call>bc", ["abc", "a<call>c"], ("x", "abc")),
        ("x<call>y", ["y", "<call>"], ("x", "<call>")),
    ],
)
def test_the_text_ends_where_it_should(text: str, stop: list[str], expected: tuple[str, str | None]) -> None:
    assert streamed(text, stop) == expected


def test_spelled_by_ordinary_tokens_it_stops_too() -> None:
    stream = TextStream(TOKENIZER, [], ["<call>x"])
    out = "".join(stream.push(TOKENIZER.encode(char, special=False)[0]) for char in "ab<call>x")
    assert (out, stream.matched) == ("ab", "<call>x")


PIECES = ["a", "b", "é", "<call>", "<|im_end|>"]


@given(
    st.lists(st.sampled_from(PIECES), max_size=12),
    st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join), min_size=1, max_size=3),
)
@settings(deadline=None)
def test_the_first_to_be_complete_decides(pieces: list[str], stop: list[str]) -> None:
    """Against the definition, written down: after each piece look at all that is there."""

    def seen(upto: int) -> tuple[str, str]:
        said = pieces[:upto]
        return "".join(one for one in said if one not in SPECIALS), "".join(said)

    expected: tuple[str, str | None] = (seen(len(pieces))[0], None)
    for upto in range(1, len(pieces) + 1):
        text, written = seen(upto)
        cuts = []
        for one in stop:
            if not any(special in one for special in SPECIALS):
                if one in text:
                    cuts.append(text.index(one))
            elif one in written:
                before = written[: written.index(one)]
                for special in SPECIALS:
                    before = before.replace(special, "")
                cuts.append(len(before))
        if cuts:
            expected = text[: min(cuts)], "some"
            break
    out, matched = streamed("".join(pieces), stop)
    assert (out, matched is not None) == (expected[0], expected[1] is not None)


def test_what_comes_before_stop_sequences_count_is_text() -> None:
    stream = TextStream(TOKENIZER, [], ["a<call>"])
    ids = TOKENIZER.encode("a<call>a<call>", special=False)
    out = [stream.push(token, match=at >= 2) for at, token in enumerate(ids)]
    assert ("".join(out), stream.matched) == ("a", "a<call>")


def test_nothing_special_is_written_out_for_those_who_do_not_ask() -> None:
    stops = StopSequences(["END"], SPECIALS)
    assert stops.push_hidden("<call>") == ""
    assert stops.push("xE") == "x"
    assert stops.push_hidden("<call>") == ""
    assert stops.push("N") + stops.flush() == "EN"


@pytest.fixture(scope="module")
def engine(
    tiny_model: Callable[[str], Path],
    common_store: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Engine:
    """ "tools" has special tokens that the base doesn't know."""
    store = tmp_path_factory.mktemp("stops") / "store"
    for name in ("lora", "tools"):
        shutil.copytree(common_store("llama") / "lora", store / name)
    added = {
        str(id): {"content": token, "special": True} for id, token in zip((END, CALL), SPECIALS, strict=True)
    }
    (store / "tools" / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return make_engine(tiny_model("llama"), store)


def answer(
    engine: Engine, adapter: str | None, token: int, **stopping: object
) -> tuple[str, list[int], Finished]:
    """Of a model that says one token after the other, always the same."""
    request = Request(
        "stops",
        "hello",
        () if adapter is None else (AdapterRef(adapter),),
        sampling=SamplingParams(logit_bias=((token, 10_000.0),)),
        stopping=StoppingParams(**{"max_new_tokens": 6, **stopping}),  # type: ignore[arg-type]
    )
    [outputs] = engine.generate([request])
    finished = outputs[-1].finished
    assert finished is not None, outputs[-1].error
    tokens = [token for output in outputs for token in output.token_ids]
    return "".join(output.text for output in outputs), tokens, finished


def test_an_adapters_own_special_token_stops_its_answers(engine: Engine) -> None:
    text, tokens, finished = answer(engine, "tools", CALL, stop=("<call>",))
    assert (text, tokens) == ("", [CALL])
    assert (finished.reason, finished.stop_sequence) == (FinishReason.STOP_SEQUENCE, "<call>")
    text, tokens, finished = answer(engine, "tools", CALL, stop=("<call><call><call>",))
    assert (finished.reason, len(tokens), text) == (FinishReason.STOP_SEQUENCE, 3, "")


def test_to_others_the_same_letters_are_text(engine: Engine) -> None:
    for adapter in (None, "lora"):
        _, tokens, finished = answer(engine, adapter, CALL, stop=("<call>",))
        assert (finished.reason, len(tokens)) == (FinishReason.LENGTH, 6)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_at_the_end_of_sequence_the_stop_sequence_is_the_reason(engine: Engine, ignore_eos: bool) -> None:
    _, tokens, finished = answer(engine, None, EOS, stop=("<eos>",), ignore_eos=ignore_eos)
    assert tokens == [EOS]
    assert (finished.reason, finished.stop_sequence) == (FinishReason.STOP_SEQUENCE, "<eos>")
    assert finished.stop_token_id is None


def test_text_held_back_comes_out_at_another_end(engine: Engine) -> None:
    generation = engine.intake.prepare(Request("g", "x", stopping=StoppingParams(stop=("b<pad>", "<eos>!"))))
    [b] = byte_tokenizer()("b")["input_ids"]
    assert generation.accept(b, 0.0) == ("", None)
    assert generation.accept(EOS, 0.0) == ("b", FinishReason.STOP)
    generation.stack.release()
    generation = engine.intake.prepare(Request("g", "x", stopping=StoppingParams(stop=("b<eos>",))))
    assert generation.accept(b, 0.0) == ("", None)
    assert generation.accept(EOS, 0.0) == ("", FinishReason.STOP_SEQUENCE)
    assert generation.text.matched == "b<eos>"
    generation.stack.release()


def test_before_min_new_tokens_it_does_not_count(engine: Engine) -> None:
    _, tokens, finished = answer(engine, "tools", CALL, stop=("<call>",), min_new_tokens=4)
    assert (finished.reason, tokens) == (FinishReason.STOP_SEQUENCE, [CALL] * 4)
    _, tokens, finished = answer(engine, None, EOS, stop=("<eos>",), min_new_tokens=4, ignore_eos=True)
    assert (finished.reason, tokens) == (FinishReason.STOP_SEQUENCE, [EOS] * 4)


def test_a_stop_token_that_is_text_stays_what_it_was(engine: Engine) -> None:
    [x] = byte_tokenizer()("x")["input_ids"]
    text, _, finished = answer(engine, None, x, stop=("xx",), stop_token_ids=(x,))
    assert (text, finished.reason, finished.stop_token_id) == ("", FinishReason.STOP, x)
