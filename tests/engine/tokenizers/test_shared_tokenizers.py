"""Adapters' tokenizers in all the forms in which they are saved, and each read once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import import_protobuf

from polygraft.base.loader import load_base
from polygraft.base.tokenizer import TextTokenizer
from polygraft.engine.tokenizers import shared_tokenizers
from polygraft.engine.tokenizers.shared_tokenizers import SharedTokenizers
from polygraft.errors import AdapterInvalid
from tests.tiny import EOS

BASE_FILES = ("tokenizer.json", "tokenizer_config.json")
Files = Mapping[str, bytes]


def encoded(**files: object) -> dict[str, bytes]:
    return {
        name.replace("__", "."): content if isinstance(content, bytes) else json.dumps(content).encode()
        for name, content in files.items()
    }


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def base(folder: Path) -> TextTokenizer:
    return load_base(str(folder)).tokenizer


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each tokenizer.json or vocabulary that is parsed."""
    found: list[int] = []
    read = shared_tokenizers.read_tokenizer

    def note(name: str, files: Files) -> TextTokenizer:
        found.append(len(files.get("tokenizer.json") or files["vocab.json"]))
        return read(name, files)

    monkeypatch.setattr(shared_tokenizers, "read_tokenizer", note)
    return found


@pytest.fixture
def tokenizers(base: TextTokenizer) -> SharedTokenizers:
    return SharedTokenizers(base)


def foreign(*more: str) -> bytes:
    """A tokenizer.json of 100 KB that isn't the base's."""
    vocabulary = {
        char: at for at, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True))
    }
    vocabulary.update({f"unused {at}": 256 + at for at in range(5000)})
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens(list(more))
    return tokenizer.to_str().encode()


def test_the_bases_own_file_is_never_parsed_again(
    tokenizers: SharedTokenizers, base: TextTokenizer, folder: Path, reads: list[int]
) -> None:
    own = {file: (folder / file).read_bytes() for file in BASE_FILES}
    configs: list[object] = [{}, {"eos_token": "<pad>"}, {"chat_template": "x", "model_max_length": 8}]
    for config in configs:
        found = tokenizers.of("a", {**own, **encoded(tokenizer_config__json=config)})
        assert found.backend is base.backend
    assert tokenizers.of("a", own).backend is base.backend
    assert tokenizers.of("a", {}) is base
    assert max(reads) < 3000 < len(own["tokenizer.json"])
    assert len(reads) == 3  # {} and the third are the same without what doesn't matter


def test_the_bases_tokenizer_saved_in_another_way_is_parsed_once(
    tokenizers: SharedTokenizers, base: TextTokenizer, folder: Path, reads: list[int]
) -> None:
    again = json.loads((folder / "tokenizer.json").read_text())
    again["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    for at in range(3):
        files = encoded(tokenizer__json=again, tokenizer_config__json={"chat_template": f"template {at}"})
        assert tokenizers.of(f"adapter-{at}", files).backend is base.backend
    assert len(reads) == 1


def test_adapters_that_ship_the_same_share_it(tokenizers: SharedTokenizers, reads: list[int]) -> None:
    files = {"tokenizer.json": foreign()}
    first = tokenizers.of("a", files)
    assert tokenizers.of("b", dict(files)) is first
    assert tokenizers.of("c", {**files, **encoded(generation_config__json={})}) is first
    assert len(reads) == 1
    other = tokenizers.of("d", {"tokenizer.json": foreign("<tool>")})
    assert other is not first
    assert first.backend.token_to_id("<tool>") is None
    assert len(reads) == 2


def test_one_that_nobody_uses_is_let_go(tokenizers: SharedTokenizers) -> None:
    found = tokenizers.of("a", {"tokenizer.json": foreign()})
    assert len(tokenizers._read) == 1
    del found
    assert len(tokenizers._read) == 0


def test_what_a_configuration_adds_is_added_to_the_base(
    tokenizers: SharedTokenizers, base: TextTokenizer, folder: Path
) -> None:
    own = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}
    text = "a<tool>b"
    decoder = {"258": {"content": "<tool>", "special": True}}
    for config in (
        {"added_tokens_decoder": decoder},
        {"eos_token": "<tool>"},
        {"extra_special_tokens": ["<tool>"]},
        {"additional_special_tokens": ["<tool>"]},
    ):
        for files in (own, {}):
            found = tokenizers.of("a", {**files, **encoded(tokenizer_config__json=config)})
            assert found.backend.encode(text).ids == [
                *base.encode("a", special=False),
                258,
                *base.encode("b", special=False),
            ]
    assert base.backend.token_to_id("<tool>") is None


ADDED = {"<tool>": 258, "<call>": 259}


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_added_tokens_of_a_slow_tokenizer_count(
    tokenizers: SharedTokenizers, folder: Path, with_tokenizer: bool
) -> None:
    files = encoded(added_tokens__json=ADDED)
    if with_tokenizer:
        files["tokenizer.json"] = (folder / "tokenizer.json").read_bytes()
    found = tokenizers.of("a", files)
    assert found.backend.encode("<call>x<tool>").ids[::2] == [259, 258]


def slow(folder: Path, extra: int = 0, **config: object) -> dict[str, bytes]:
    """A vocabulary as a slow tokenizer saves it, by default without the base's own added tokens."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocabulary = {**model["vocab"], **{f"more {at}": 256 + at for at in range(extra)}}
    return encoded(
        vocab__json=vocabulary,
        merges__txt=b"#version: 0.2\n",
        added_tokens__json={"<tool>": 256 + extra, "<|endoftext|>": 257 + extra},
        tokenizer_config__json={"unk_token": "<|endoftext|>", **config},
    )


@pytest.mark.parametrize("class_name", ["GPT2Tokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast"])
def test_a_slow_tokenizers_files_give_what_transformers_makes_of_them(
    tokenizers: SharedTokenizers, folder: Path, tmp_path: Path, class_name: str
) -> None:
    files = slow(folder, extra=3, tokenizer_class=class_name, eos_token="<tool>")
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    expected = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    found = tokenizers.of("a", files)
    for text in ("a<tool>b c", "it's 42<|endoftext|> and naïve", "more 1"):
        assert found.encode(text, special=True) == expected(text)["input_ids"]
    assert found.encode("<tool>", special=False) == [259]
    assert found.special_tokens == expected.special_tokens_map


def test_the_bases_vocabulary_in_a_slow_tokenizers_files_is_the_bases(
    tokenizers: SharedTokenizers, base: TextTokenizer, folder: Path
) -> None:
    """With no class to build it, it is compared."""
    files = slow(folder)
    del files["added_tokens.json"], files["tokenizer_config.json"]
    assert tokenizers.of("a", files).backend is base.backend
    named = {**files, **encoded(tokenizer_config__json={"tokenizer_class": "PreTrainedTokenizerFast"})}
    assert tokenizers.of("a", named).backend is base.backend
    found = tokenizers.of("a", {**files, **encoded(added_tokens__json=ADDED)})
    assert found.encode("<tool>", special=False) == [258]


@pytest.mark.parametrize("class_name", [None, "LlamaTokenizer", "NoSuchTokenizer", "pipeline", "../x", 7])
def test_another_vocabulary_that_cannot_be_built_is_refused(
    tokenizers: SharedTokenizers, folder: Path, class_name: object
) -> None:
    files = slow(folder, extra=2, tokenizer_class=class_name)
    with pytest.raises(AdapterInvalid, match=r"in vocab\.json and merges\.txt alone, isn't the base's"):
        tokenizers.of("a", files)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"added_tokens__json": {"<tool>": 290}}, "'<tool>' is listed as 290 and would be 258"),
        (
            {"tokenizer_config__json": {"added_tokens_decoder": {"270": {"content": "<tool>"}}}},
            "'<tool>' is listed as 270 and would be 258",
        ),
        ({"added_tokens__json": {f"<{at}>": at for at in range(500, 510)}}, "and 5 more"),
        ({"added_tokens__json": {"<tool>": "258"}}, "must hold a token's id for each"),
        ({"added_tokens__json": b"["}, "added_tokens.json can't be read"),
        ({"tokenizer_config__json": {"added_tokens_decoder": [1]}}, "must hold an object with its content"),
    ],
)
def test_added_tokens_that_cannot_be_as_they_are_listed(
    tokenizers: SharedTokenizers, folder: Path, files: dict[str, Any], text: str
) -> None:
    own = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}
    for more in (own, {}):
        with pytest.raises(AdapterInvalid, match=text):
            tokenizers.of("a", {**more, **encoded(**files)})


def test_a_listed_id_gives_way_to_the_tokenizers_own(tokenizers: SharedTokenizers, folder: Path) -> None:
    """As in transformers: tokenizer.json has the last word on what it has."""
    files = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}
    files.update(encoded(added_tokens__json={"<eos>": 7}))
    assert tokenizers.of("a", files).encode("<eos>", special=False) == [EOS]


def test_a_sentencepiece_model_is_compared_with_the_base(
    tokenizers: SharedTokenizers, base: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = import_protobuf().ModelProto()
    by_id = {id: token for token, id in base.backend.get_vocab().items()}
    for id in range(len(by_id)):
        model.pieces.add(piece=by_id[id], score=-float(id))
    files = {"tokenizer.model": model.SerializeToString()}
    config = encoded(tokenizer_config__json={"tokenizer_class": "LlamaTokenizer", "eos_token": "<pad>"})
    found = tokenizers.of("a", {**files, **config})
    assert found.backend is base.backend
    assert found.special_tokens == {"eos_token": "<pad>"}
    added = tokenizers.of("a", {**files, **config, **encoded(added_tokens__json=ADDED)})
    assert added.encode("<tool>", special=False) == [258]
    model.pieces[3].piece = "other"
    with pytest.raises(AdapterInvalid, match=r"in tokenizer\.model alone, isn't the base's"):
        tokenizers.of("a", {"tokenizer.model": model.SerializeToString(), **config})
    with pytest.raises(AdapterInvalid, match=r"tokenizer\.model can't be read"):
        tokenizers.of("a", {"tokenizer.model": b"\xff" * 50, **config})


@pytest.mark.parametrize("file", ["tekken.json", "tiktoken.model", "qwen.tiktoken"])
def test_a_vocabulary_that_cant_be_read_is_the_bases_own_file_or_refused(
    base: TextTokenizer, file: str
) -> None:
    content = b"IQ== 0"
    own = replace(base, hashes={**base.hashes, file: hashlib.sha256(content).hexdigest()})
    assert SharedTokenizers(own).of("a", {file: content}).backend is base.backend
    with pytest.raises(AdapterInvalid, match=rf"in {file} alone, isn't the base's"):
        SharedTokenizers(base).of("a", {file: content})


def test_special_tokens_that_a_folder_does_not_name_are_the_bases(
    tokenizers: SharedTokenizers, base: TextTokenizer
) -> None:
    assert tokenizers.of("a", {"tokenizer.json": foreign()}).special_tokens == base.special_tokens
    files = {"tokenizer.json": foreign("<s>"), **encoded(tokenizer_config__json={"bos_token": "<s>"})}
    assert tokenizers.of("a", files).special_tokens == {"bos_token": "<s>"}
