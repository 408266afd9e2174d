"""From a prompt to token ids and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from polygraft.base.loader import load_base
from polygraft.engine.prompts.prompts import Prompts
from polygraft.errors import ChatTemplateFailed, ContextLengthExceeded, InvalidRequest
from polygraft_types.requests import Chat, ChatMessage
from tests.tiny import EOS, VOCABULARY, byte_tokenizer


@pytest.fixture(scope="module")
def prompts(tiny_model: Callable[[str], Path]) -> Prompts:
    return Prompts.of_base(load_base(str(tiny_model("llama"))))


@pytest.fixture
def with_template(tiny_model: Callable[[str], Path]) -> Callable[[str | None], Prompts]:
    base = load_base(str(tiny_model("llama")))

    def use(template: str | None) -> Prompts:
        templates = {} if template is None else {"default": template}
        return Prompts.of_base(replace(base, tokenizer=replace(base.tokenizer, chat_templates=templates)))

    return use


def chat(*turns: tuple[str, str]) -> Chat:
    return Chat(tuple(ChatMessage(role, content) for role, content in turns))


def test_what_cannot_fit_is_refused_before_it_is_tokenized(
    prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "_tokenizer", None)
    with pytest.raises(ContextLengthExceeded, match="prompt: 100000 characters"):
        prompts.token_ids("x" * 100_000)


@pytest.mark.parametrize("text", ["a", "naïve 日本 🙂", " ", "\n", "\0", "a" * 1000])
def test_text_goes_in_and_comes_out(prompts: Prompts, text: str) -> None:
    ids = list(prompts.token_ids(text))
    assert ids == byte_tokenizer()(text)["input_ids"]
    assert prompts.decode(ids) == text


def test_ids_are_taken_as_they_are(prompts: Prompts) -> None:
    assert tuple(prompts.token_ids((0, EOS, VOCABULARY - 1))) == (0, EOS, VOCABULARY - 1)


def test_special_tokens_have_no_text(prompts: Prompts) -> None:
    assert prompts.decode([*prompts.token_ids("ab"), EOS]) == "ab"


def test_a_chat_goes_through_the_template_and_asks_for_an_answer(prompts: Prompts) -> None:
    ids = prompts.token_ids(chat(("system", "be brief"), ("user", "hi")))
    assert prompts.decode(ids) == "[system]be brief\n[user]hi\n[assistant]"


def test_a_chat_gets_no_special_tokens_but_the_templates(
    with_template: Callable[[str | None], Prompts],
) -> None:
    prompts = with_template("<eos>{{ messages[0].content }}")
    assert list(prompts.token_ids(chat(("user", "a")))) == [EOS, *prompts.token_ids("a")]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("", "prompt: must not be empty"),
        ((), "token_ids.ids: must not be empty"),
        ((0, VOCABULARY), r"token_ids.ids\[1\]: must be in \[0, 288\), got 288"),
        ((-1,), r"token_ids.ids\[0\]: must be in \[0, 288\), got -1"),
        ((2**40,), r"token_ids.ids\[0\]: must be in"),
        (Chat(()), "chat.messages: must not be empty"),
    ],
)
def test_prompts_that_are_none(prompts: Prompts, prompt: str | tuple[int, ...] | Chat, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        prompts.token_ids(prompt)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (None, "chat: the model has no chat template"),
        ("{{ raise_exception('no system role') }}", "chat.messages: .* refuses them: no system role"),
        ("", "chat: the model has no chat template"),
        ("{% if false %}x{% endif %}", "chat: must not be empty"),
    ],
)
def test_templates_that_refuse(
    with_template: Callable[[str | None], Prompts], template: str | None, text: str
) -> None:
    prompts = with_template(template)
    with pytest.raises(InvalidRequest, match=text):
        prompts.token_ids(chat(("user", "hi")))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("x\n{{ messages[5].content.x }}", "of the model fails in line 2: UndefinedError: "),
        ("{{ 1 + 'a' }}", "in line 1: TypeError: "),
        ("x\n\n{{ 1 / 0 }}", "in line 3: ZeroDivisionError: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "in line 1: RecursionError: "),
        ("{{ 'x'.encode('none') }}", "in line 1: LookupError: "),
        ("{{ '%c' | format(2**40) }}", "in line 1: OverflowError: "),
        ("{% for %}", "in line 1: Expected an expression"),
        ("{{ '\\ud800' }}", "fails: UnicodeEncodeError: "),
    ],
)
def test_templates_that_fail(
    with_template: Callable[[str | None], Prompts], template: str, text: str
) -> None:
    with pytest.raises(ChatTemplateFailed, match=text):
        with_template(template).token_ids(chat(("user", "hi")))


def test_has_chat_template(with_template: Callable[[str | None], Prompts]) -> None:
    assert with_template("x").has_chat_template
    assert not with_template(None).has_chat_template


@pytest.mark.parametrize("ids", [[-1], [VOCABULARY], [0, 1, 2**63]])
def test_ids_that_have_no_text(prompts: Prompts, ids: list[int]) -> None:
    with pytest.raises(InvalidRequest, match=r"token_ids\[\d\]: must be in"):
        prompts.decode(ids)


def test_an_id_without_a_token_has_no_text(prompts: Prompts) -> None:
    assert prompts.decode([VOCABULARY - 1]) == ""


def test_of_a_bases_several_templates_the_default_is_used(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    config = json.loads((base / "tokenizer_config.json").read_text())
    tools = {"name": "tool_use", "template": "tools"}
    for listed, has in (([tools, {"name": "default", "template": "plain"}], True), ([tools], False)):
        (base / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": listed}))
        prompts = Prompts.of_base(load_base(str(base)))
        assert prompts.has_chat_template is has
        if has:
            assert prompts.decode(prompts.token_ids(chat(("user", "hi")))) == "plain"
        else:
            with pytest.raises(InvalidRequest, match="no chat template"):
                prompts.token_ids(chat(("user", "hi")))
