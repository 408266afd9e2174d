"""A tokenizer whose file makes its core fail harms nobody but the request that meets it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from polygraft.base.loader import load_base
from polygraft.base.tokenizer import TextTokenizer, contained, text_tokenizer
from polygraft.engine.prompts.prompts import Prompts
from polygraft.engine.sampling.logprobs import TokenTexts
from polygraft.errors import BaseModelError, InvalidRequest
from polygraft_types.requests import AdapterRef, Request, ResponseParams, SamplingParams, StoppingParams
from tests.engines import greedy, make_engine, run_greedy
from tests.tiny import byte_tokenizer

PANICS_ON_ENCODING = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AQAAAAA="}}
# Fails on tokens of one character that is the one to strip.
PANICS_ON_DECODING = {"decoder": {"type": "Strip", "content": "x", "start": 5, "stop": 5}}
DROPS_TEXT = {
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<eos>", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [256], "tokens": ["<eos>"]}},
    }
}


def file_with(**parts: object) -> str:
    return json.dumps({**json.loads(byte_tokenizer().backend_tokenizer.to_str()), **parts})


def tokenizer_with(tmp_path: Path, **parts: object) -> TextTokenizer:
    (tmp_path / "tokenizer.json").write_text(file_with(**parts))
    return text_tokenizer(PreTrainedTokenizerFast.from_pretrained(tmp_path))


def test_what_fails_is_an_error_like_any_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="panics"):
        tokenizer_with(tmp_path, **PANICS_ON_ENCODING)
    tokenizer = tokenizer_with(tmp_path, **PANICS_ON_DECODING)
    ids = tokenizer.encode("axb", special=False)
    with pytest.raises(ValueError, match="panics"):
        tokenizer.decode(ids)
    assert [TokenTexts(tokenizer)(id) for id in ids] == ["a", "\ufffd", "b"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_end_of_the_process_is_let_through(error: type[BaseException]) -> None:
    def end() -> None:
        raise error

    with pytest.raises(error):
        contained(end)


@pytest.mark.parametrize("parts", [DROPS_TEXT, PANICS_ON_ENCODING])
def test_a_base_with_such_a_tokenizer_is_refused(
    llama: Path, tmp_path: Path, parts: dict[str, object]
) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    (base / "tokenizer.json").write_text(file_with(**parts))
    with pytest.raises(BaseModelError, match=r"post-processor|panics"):
        load_base(str(base))


def test_an_adapters_tokenizer_that_fails_harms_nobody_else(
    llama: Path, llama_store: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    for name, parts in (
        ("decodes", PANICS_ON_DECODING),
        ("encodes", PANICS_ON_ENCODING),
        ("drops", DROPS_TEXT),
    ):
        shutil.copytree(llama_store / "lora", store / name)
        (store / name / "tokenizer.json").write_text(file_with(**parts))
    engine = make_engine(llama, store)
    for name, text in (("encodes", "panics"), ("drops", "post-processor")):
        assert text in engine.adapters.registry.get(name).problems[0]
    [warning] = engine.adapters.registry.get("decodes").warnings
    assert "fails on some texts" in warning
    [x] = byte_tokenizer()("x")["input_ids"]
    refs = (AdapterRef("decodes"),)
    bad = Request(
        "bad",
        "a",
        refs,
        sampling=SamplingParams(logit_bias=((x, 10_000.0),)),
        stopping=StoppingParams(max_new_tokens=4),
    )
    alone = run_greedy(engine, [greedy("alone", [5, 6, 7], "decodes", 8)])
    good = greedy("good", [5, 6, 7], "decodes", 8)
    failed, answered = engine.generate([bad, good])
    assert "has no text" in str(failed[-1].error)
    assert [[token for output in answered for token in output.token_ids]] == alone
    with pytest.raises(InvalidRequest, match="token_ids: the tokenizer fails on them"):
        engine.intake.prepare(Request("echo", (x,), refs, response=ResponseParams(echo=True)))
    assert engine.adapters.registry.get("decodes").running_requests == 0
    engine.check_integrity()


def test_a_text_that_the_tokenizer_fails_on_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = Prompts.of_base(load_base(str(llama)))

    def fail(*_: object, **__: object) -> list[int]:
        raise ValueError("out of luck")

    monkeypatch.setattr(TextTokenizer, "encode", fail)
    with pytest.raises(InvalidRequest, match="prompt: the tokenizer fails on it: out of luck"):
        prompts.token_ids("x")
