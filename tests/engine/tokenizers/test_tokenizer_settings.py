"""What a tokenizer's file says for training (a length to cut or pad to, dropout) changes nobody's tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from polygraft.engine.engine import Engine
from polygraft_types.requests import (
    AdapterRef,
    Chat,
    ChatMessage,
    Request,
    ResponseParams,
    ScoreRequest,
    StoppingParams,
)
from tests.engines import make_engine
from tests.tiny import byte_tokenizer

TEXT = "a text of more than twenty-four letters, and so of as many tokens"
CHAT = Chat((ChatMessage("user", TEXT),))
CUT = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
PAD = {
    "strategy": {"Fixed": 24},
    "direction": "Left",
    "pad_to_multiple_of": None,
    "pad_id": 257,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}


def with_settings(tokenizer: Tokenizer, **model: object) -> str:
    """A tokenizer's file that cuts and pads."""
    content = json.loads(tokenizer.to_str())
    content.update(truncation=CUT, padding=PAD)
    content["model"].update(model)
    return json.dumps(content)


def merging_tokenizer() -> Tokenizer:
    """Bytes and some pairs of them, so that there is a merge to drop."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "w"), ("t", "e"), ("l", "e"), ("te", "r"), ("a", "s")]
    vocabulary = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: at for at, token in enumerate(vocabulary)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def engine(
    tiny_model: Callable[[str], Path],
    common_store: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Engine:
    """The base's file, one like it and an adapter's own all cut and pad."""
    folder = tmp_path_factory.mktemp("settings")
    base = shutil.copytree(tiny_model("llama"), folder / "base")
    cutting = with_settings(byte_tokenizer().backend_tokenizer)
    (base / "tokenizer.json").write_text(cutting)
    for name in ("same", "own"):
        shutil.copytree(common_store("llama") / "lora", folder / "store" / name)
    (folder / "store" / "same" / "tokenizer.json").write_text(cutting + "\n")
    own = with_settings(merging_tokenizer(), dropout=0.9)
    (folder / "store" / "own" / "tokenizer.json").write_text(own)
    config = {"model_max_length": 8, "padding_side": "left", "truncation_side": "left"}
    for place in (base, folder / "store" / "same", folder / "store" / "own"):
        file = place / "tokenizer_config.json"
        given = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**given, **config}))
    return make_engine(base, folder / "store")


def asked(engine: Engine, adapter: str | None) -> dict[str, Any]:
    """The tokens of everything that takes text."""
    refs = () if adapter is None else (AdapterRef(adapter),)
    stack = engine.intake.resolve(refs)
    prompts = engine.prompts.of(stack)
    stack.release()
    stopping, response = StoppingParams(max_new_tokens=1, ignore_eos=True), ResponseParams(echo=True)
    requests = [
        Request("chat", CHAT, refs, stopping=stopping, response=response),
        Request("text", TEXT, refs, stopping=stopping, response=response),
        ScoreRequest("score", "Say: ", (TEXT,), refs),
    ]
    chat, text, score = engine.generate(requests)
    return {
        "chat": list(chat[0].prompt_ids),
        "text": list(text[0].prompt_ids),
        "echo": "".join(output.text for output in chat)[: len("[user]" + TEXT)],
        "score": [token.token_id for token in score[0].scores[0].tokens],
        "tokenize": [list(prompts.token_ids(CHAT)), list(prompts.token_ids(TEXT))],
        "beginning": len(prompts.pairs(CHAT, [TEXT])[0][1]),
    }


@pytest.mark.parametrize("adapter", [None, "same", "own"])
def test_everything_is_whole_whatever_was_asked_before(engine: Engine, adapter: str | None) -> None:
    plain = merging_tokenizer() if adapter == "own" else byte_tokenizer().backend_tokenizer

    def encoded(text: str) -> list[int]:
        return plain.encode(text).ids

    rendered = f"[user]{TEXT}\n[assistant]"
    expected = {
        "chat": encoded(rendered),
        "text": encoded(TEXT),
        "echo": "[user]" + TEXT,
        "score": encoded("Say: " + TEXT)[len(encoded("Say:")) :],
        "tokenize": [encoded(rendered), encoded(TEXT)],
        "beginning": len(encoded(TEXT)),
    }
    for others in (("own", "same", None), (None, "own", "same")):
        for other in others:
            asked(engine, other)
        assert asked(engine, adapter) == expected


def test_text_has_the_tokens_that_transformers_gives_it(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    content = json.loads((base / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<eos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [256], "tokens": ["<eos>"]}},
    }
    content["truncation"] = CUT
    (base / "tokenizer.json").write_text(json.dumps(content))
    for setting in (True, False):
        config = json.loads((base / "tokenizer_config.json").read_text())
        config.update(bos_token="<eos>", add_bos_token=setting)
        (base / "tokenizer_config.json").write_text(json.dumps(config))
        prompts = make_engine(base).prompts.base
        expected = AutoTokenizer.from_pretrained(base)(TEXT, add_special_tokens=True)["input_ids"]
        assert prompts.token_ids(TEXT) == expected
        assert len(expected) == len(TEXT) + 1


def test_many_threads_get_what_one_gets(engine: Engine) -> None:
    stack = engine.intake.resolve([AdapterRef("own")])
    prompts = engine.prompts.of(stack)
    stack.release()
    expected = [list(prompts.token_ids(CHAT)), list(prompts.token_ids(TEXT)), prompts.pairs(TEXT, [TEXT])]

    def ask(_: int) -> list[Any]:
        return [list(prompts.token_ids(CHAT)), list(prompts.token_ids(TEXT)), prompts.pairs(TEXT, [TEXT])]

    with ThreadPoolExecutor(8) as pool:
        assert all(answer == expected for answer in pool.map(ask, range(200)))
