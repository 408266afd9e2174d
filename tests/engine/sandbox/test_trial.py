"""Tokenizers are read and tried in a worker: the attacks end there, and what is served is what was tried."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from polygraft.base.tokenizer import TextTokenizer, text_tokenizer
from polygraft.engine.sandbox import pool
from polygraft.engine.sandbox.parts import needs_worker, parts_of, problems_of
from polygraft.engine.sandbox.pool import Workers
from polygraft.engine.sandbox.process import WorkerUnavailable
from polygraft.engine.sandbox.reader import TokenizerReader
from polygraft.engine.tokenizers.adapter_tokenizer import read_tokenizer
from polygraft.errors import AdapterInvalid, ResourceExhausted, TokenizerFailed
from tests.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    workers = Workers()
    yield workers
    workers.end()


@pytest.fixture(scope="module")
def base() -> TextTokenizer:
    return text_tokenizer(byte_tokenizer())


@pytest.fixture(scope="module")
def read(workers: Workers, base: TextTokenizer) -> Callable[..., TextTokenizer]:
    made = TokenizerReader(base, workers)

    def call(content: str | bytes, **files: object) -> TextTokenizer:
        content = content.encode() if isinstance(content, str) else content
        others = {f"{name}.json": json.dumps(value).encode() for name, value in files.items()}
        return made("x", {"tokenizer.json": content, **others})

    return call


def changed(**parts: Any) -> str:
    return json.dumps({**json.loads(byte_tokenizer().backend_tokenizer.to_str()), **parts})


PADDING = {
    "strategy": {"Fixed": 2**36}, "direction": "Right", "pad_to_multiple_of": None,
    "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
}  # fmt: skip


def replaces(literal: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": literal}, "content": content}


def splits(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


SEQUENCE_256 = {"type": "Sequence", "normalizers": [replaces("a", "a" * 1000)] * 4}
ATTACKS: dict[str, str | bytes] = {
    "panics": changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "AQAAAAA="}),
    "deep": changed(normalizer=None).replace(
        '"normalizer": null', '"normalizer": ' + '{"type":"Sequence","normalizers":[' * 10**5 + "]}" * 10**5
    ),
    "deep-regex": changed(pre_tokenizer=splits("(" * 5000 + "a" + ")" * 5000)),
    "a-gigabyte": changed(normalizer=SEQUENCE_256),
    "no-json": "{",
    "no-text": b"\xff\xfe",
    "empty": "",
    "a-list": "[]",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused_and_the_next_is_read(attack: str, read: Callable[..., TextTokenizer]) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        read(ATTACKS[attack])
    assert all(problem.isprintable() and len(problem) < 500 for problem in caught.value.problems)
    assert read(changed()).encode("hi", special=True) == byte_tokenizer()("hi")["input_ids"]


def test_a_padding_that_would_abort_is_switched_off(read: Callable[..., TextTokenizer]) -> None:
    tokenizer = read(
        changed(
            padding=PADDING,
            truncation={"max_length": 1, "stride": 0, "strategy": "LongestFirst", "direction": "Right"},
        )
    )
    assert tokenizer.encode("hello", special=True) == byte_tokenizer()("hello")["input_ids"]


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": {"9999999999": {"content": "<x>"}}},
        {"added_tokens_decoder": []},
        {"extra_special_tokens": 3},
        {"eos_token": "x" * 10**6},
        {"eos_token": {"content": 3}},
        {"model_max_length": "x", "tokenizer_file": "/etc/passwd", "vocab_file": "/etc/passwd"},
        {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"},
    ],
)
def test_strange_configurations_harm_nobody(
    config: dict[str, object], read: Callable[..., TextTokenizer]
) -> None:
    try:
        tokenizer = read(changed(), tokenizer_config=config)
    except AdapterInvalid:
        return
    assert tokenizer.encode("hi", special=False) == byte_tokenizer()("hi")["input_ids"]
    assert all(len(str(token)) < 3000 for token in tokenizer.special_tokens.values())


def test_the_rest_comes_along(read: Callable[..., TextTokenizer]) -> None:
    tokenizer = read(changed(), tokenizer_config={"eos_token": "A", "chat_template": "x"})
    assert tokenizer.special_tokens["eos_token"] == "A"
    assert tokenizer.chat_template == "x"
    assert tokenizer.encoder is None
    files = {"tokenizer.json": changed().encode(), "tokenizer_config.json": b'{"eos_token": "A"}'}
    assert tokenizer.backend.to_str() == read_tokenizer("x", files).backend.to_str()


def test_what_isnt_known_to_be_linear_is_encoded_in_a_worker(
    read: Callable[..., TextTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "CPU_SECONDS", 0.3)
    tokenizer = read(
        changed(
            normalizer={
                "type": "Sequence",
                "normalizers": [
                    replaces("ж", "ѭ" * 100),
                    replaces("ѭ", "ѯ" * 100),
                    replaces("ѯ", "b" * 10000),
                ],
            }
        )
    )
    assert tokenizer.encoder is not None
    assert tokenizer.encode("hi 日本", special=False) == byte_tokenizer()("hi 日本")["input_ids"]
    with pytest.raises(TokenizerFailed):
        tokenizer.encode("ж" * 100, special=False)
    assert tokenizer.encode("hi", special=False) == byte_tokenizer()("hi")["input_ids"]


def test_a_regex_that_takes_the_square_is_ended(
    read: Callable[..., TextTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "CPU_SECONDS", 0.3)
    tokenizer = read(changed(pre_tokenizer=splits(r"a*(?<!a)")))
    assert tokenizer.encoder is not None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with pytest.raises(TokenizerFailed, match=r"used more than 0.3 s of CPU time"):
        tokenizer.encode("a" * 40_000, special=False)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 5


def test_what_fails_on_some_texts_is_read_with_a_warning(read: Callable[..., TextTokenizer]) -> None:
    tokenizer = read(changed(decoder={"type": "Strip", "content": "a", "start": 5, "stop": 5}))
    assert "fails on some texts, which are refused: " in tokenizer.warnings[0]
    vocabulary = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "[UNK]"}
    assert (
        "WordLevel"
        in read(
            changed(
                model=vocabulary,
                added_tokens=[],
                post_processor=None,
                pre_tokenizer={"type": "WhitespaceSplit"},
            )
        ).warnings[0]
    )
    assert not read(changed()).warnings


def test_a_panic_at_a_request_is_its_error(read: Callable[..., TextTokenizer]) -> None:
    tokenizer = read(changed(pre_tokenizer=splits("(a|a)*" * 30 + "$")))
    with pytest.raises(ValueError, match="retry-limit"):
        tokenizer.encode("a" * 30 + "b", special=False)
    local = replace(tokenizer, encoder=None)
    with pytest.raises(ValueError, match="retry-limit"):
        local.encode("a" * 30 + "b", special=False)
    assert local.decode(tokenizer.encode("b", special=False)) == "b"


def test_a_refusal_is_remembered(
    read: Callable[..., TextTokenizer], workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = changed(normalizer={"type": "Prepend", "prepend": "b" * 10**8})
    with pytest.raises(AdapterInvalid) as first:
        read(attack)
    monkeypatch.setattr(workers, "read", lambda *args: pytest.fail("it has been tried"))
    with pytest.raises(AdapterInvalid) as second:
        read(attack)
    assert first.value.problems == second.value.problems


def test_no_process_to_read_in(
    base: TextTokenizer, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise WorkerUnavailable("no more processes")

    monkeypatch.setattr(workers, "read", fail)
    with pytest.raises(ResourceExhausted, match="no more processes"):
        TokenizerReader(base, workers)("x", {"tokenizer.json": b"{}"})


def tokenizer_with(**parts: Any) -> Tokenizer:
    return Tokenizer.from_str(changed(**parts))


PLAIN: dict[str, dict[str, Any]] = {
    "llama-2": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replaces(" ", "▁")]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [replaces("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
    },
    "bert": {"normalizer": json.loads(normalizers.BertNormalizer().__getstate__()), "pre_tokenizer": json.loads(pre_tokenizers.BertPreTokenizer().__getstate__()), "decoder": json.loads(decoders.WordPiece().__getstate__())},
    "gpt-2": {"pre_tokenizer": json.loads(pre_tokenizers.ByteLevel().__getstate__()), "post_processor": json.loads(processors.ByteLevel().__getstate__())},
    "beginning": {"post_processor": json.loads(processors.TemplateProcessing(single="a $A", pair="a $A $B", special_tokens=[("a", 65)]).__getstate__())},
}  # fmt: skip
SUSPECT: dict[str, dict[str, Any]] = {
    "regex": {"pre_tokenizer": splits("a+")},
    "grows": {"normalizer": replaces("a", "aa")},
    "inserts": {"normalizer": replaces("", "a")},
    "regex-replace": {"normalizer": {"type": "Replace", "pattern": {"Regex": "a"}, "content": ""}},
    "doubles": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 8}},
    "charsmap": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AQAAAAA="}},
    "many-texts": {"post_processor": json.loads(processors.TemplateProcessing(single="$A $A", pair="$A $B", special_tokens=[]).__getstate__())},
    "nested": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [{"type": "NFC"}]}]}]}]}},
}  # fmt: skip


def test_which_parts_the_server_runs_itself(base: TextTokenizer) -> None:
    own = parts_of(base.backend)
    for name, parts in PLAIN.items():
        tokenizer = tokenizer_with(**parts)
        assert not needs_worker(parts_of(tokenizer), own), name
        assert not problems_of(parts_of(tokenizer), own), name
    for name, parts in SUSPECT.items():
        if name == "charsmap":
            continue  # can't be built at all
        tokenizer = tokenizer_with(**parts)
        assert needs_worker(parts_of(tokenizer), own), name
        assert not needs_worker(parts_of(tokenizer), parts_of(tokenizer)), name


def test_decoders_run_in_the_server_and_are_bounded(base: TextTokenizer) -> None:
    own = parts_of(base.backend)
    for decoder in (
        replaces("a", "a" * 1000),
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
        {"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": True},
    ):
        tokenizer = tokenizer_with(decoder=decoder)
        assert "decoder" in problems_of(parts_of(tokenizer), own)[0]
        assert not problems_of(parts_of(tokenizer), parts_of(tokenizer))
    long = Tokenizer(models.WordLevel({"a" * 3000: 0, "b": 1}, unk_token="b"))
    assert "3000 characters" in problems_of(parts_of(long), own)[0]


def test_a_vocabulary_is_not_much_larger_than_the_bases(
    base: TextTokenizer, read: Callable[..., TextTokenizer]
) -> None:
    """The server parses it, and no other thread goes on meanwhile."""
    vocabulary = {f"{at} {'x' * 1000}": at for at in range(4200)}
    large = Tokenizer(models.WordLevel(vocabulary, unk_token=f"0 {'x' * 1000}"))
    own = parts_of(base.backend)
    assert "4 MiB more than the base's" in problems_of(parts_of(large), own)[0]
    assert not problems_of(parts_of(large), parts_of(large))
    with pytest.raises(AdapterInvalid, match="4 MiB more than the base's"):
        read(large.to_str())


def test_models_that_try_every_length(base: TextTokenizer) -> None:
    for model, suspect in (
        (models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]", max_input_chars_per_word=100), False),
        (models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]", max_input_chars_per_word=10**6), True),
        (models.Unigram([("a", -1.0), ("b" * 20, -2.0)], 0, False), False),
        (models.Unigram([("a", -1.0), ("b" * 1000, -2.0)], 0, False), True),
    ):
        tokenizer = Tokenizer(model)
        own = parts_of(tokenizer)
        assert needs_worker(own, {**own, "linear": True}) is suspect
        assert not needs_worker(own, own)


def test_the_process_that_reads_has_no_torch(workers: Workers, read: Callable[..., TextTokenizer]) -> None:
    read(changed())
    process = workers._reader._process
    assert process is not None
    mapped = Path(f"/proc/{process.pid}/maps").read_text()
    assert "tokenizers" in mapped
    assert "libtorch" not in mapped


def test_time_is_bounded_too(base: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "READ_CPU_SECONDS", 3.0)
    workers = Workers()
    slow = changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [splits(r"a*(?<!a)")] * 1000})
    with pytest.raises(AdapterInvalid, match="its tokenizer used more than 3 s of CPU time"):
        TokenizerReader(base, workers)("x", {"tokenizer.json": slow.encode()})
    workers.end()
