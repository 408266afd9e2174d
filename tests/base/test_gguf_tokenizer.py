"""A tokenizer that is read out of a GGUF file, whatever transformers makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFWriter, TokenType

from polygraft.base.gguf_tokenizer import read_gguf_tokenizer

TEMPLATE = "{% for message in messages %}{{ message['content'] }}<end>{% endfor %}"
LETTERS = [*"abcdelnort", "Ġ", "Ã", "©", "â", "ĸ", "ģ"]  # the last six are the bytes of a space, é and ▁
TOKENS = ["<unknown>", "<start>", "<end>", *LETTERS, "al", "Ġt"]


def gguf(path: Path, *, model: str = "gpt2") -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_token_merges(["a l", "Ġ t"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_it_is_the_files_own(tmp_path: Path) -> None:
    tokenizer = read_gguf_tokenizer(gguf(tmp_path / "a.gguf"))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<start>", "<end>")
    assert (tokenizer.unk_token, tokenizer.pad_token) == ("<unknown>", "<end>")
    ids = tokenizer("late tale<end>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["l", "a", "t", "e", "Ġt", "al", "e", "<end>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "late tale"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "all"}], tokenize=False) == "all<end>"


def test_no_character_is_taken_for_another(tmp_path: Path) -> None:
    tokenizer = read_gguf_tokenizer(gguf(tmp_path / "a.gguf"))
    for text in ("é", "▁a", " a "):  # ▁ is a space in SentencePiece's files
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of the kind 'llama', expected 'gpt2'"):
        read_gguf_tokenizer(gguf(tmp_path / "a.gguf", model="llama"))
