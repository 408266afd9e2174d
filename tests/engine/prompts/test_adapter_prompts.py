"""Adapters that bring a tokenizer or a chat template along are talked to in their own way, and nobody else is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from polygraft.adapters.stack import Stack
from polygraft.engine.engine import Engine
from polygraft.errors import AdapterNotFound, InvalidRequest
from polygraft_types.requests import (
    AdapterRef,
    Chat,
    ChatMessage,
    Request,
    ResponseParams,
    SamplingParams,
    ScoreRequest,
    StoppingParams,
)
from tests.engines import greedy, make_engine, run_greedy
from tests.tiny import EOS, VOCABULARY, byte_tokenizer

CHAT = Chat((ChatMessage("user", "hi"),))
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def reversed_tokenizer(extra: int = 0) -> Tokenizer:
    """Bytes with ids in the other order, and perhaps tokens that the base has no embeddings for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([f"<more-{i}>" for i in range(extra)])
    return tokenizer


def copy_of(store: Path, name: str, **files: str | dict[str, object]) -> None:
    """`lora` under another name, with more files in its folder."""
    shutil.copytree(store / "lora", store / name)
    for file, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (store / name / file.replace("__", ".")).write_text(text)


@pytest.fixture(scope="module")
def engine(
    tiny_model: Callable[[str], Path],
    common_store: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Engine:
    llama, llama_store = tiny_model("llama"), common_store("llama")
    store = tmp_path_factory.mktemp("texts") / "store"
    store.mkdir()
    shutil.copytree(llama_store / "lora", store / "lora")
    config = {"tokenizer_class": "GPT2Tokenizer", "chat_template": TEMPLATE, "eos_token": "A"}
    copy_of(store, "same", tokenizer__json=byte_tokenizer().backend_tokenizer.to_str())
    copy_of(store, "template", chat_template__jinja=TEMPLATE)
    copy_of(store, "both", tokenizer__json=reversed_tokenizer().to_str(), tokenizer_config__json=config)
    copy_of(store, "grown", tokenizer__json=reversed_tokenizer(VOCABULARY).to_str())
    copy_of(store, "broken", tokenizer__json="{")
    tools = {"name": "tool_use", "template": "no tools"}
    listed = [tools, {"name": "default", "template": TEMPLATE}]
    copy_of(store, "listed", tokenizer_config__json={"chat_template": listed})
    copy_of(store, "undecided", tokenizer_config__json={"chat_template": [tools]})
    copy_of(store, "shapeless", tokenizer_config__json={"chat_template": [{"name": "default"}]})
    copy_of(store, "slow", added_tokens__json={"<tool>": 258})
    copy_of(store, "untold", tokenizer__json=reversed_tokenizer().to_str())
    return make_engine(llama, store)


def test_who_has_a_way_of_its_own(engine: Engine) -> None:
    infos = {info.name: info for info in engine.adapters.registry.list()}
    own = {name for name, info in infos.items() if info.own_prompts}
    assert own == {"template", "both", "grown", "listed", "slow", "untold"}
    assert "tokenizer.json can't be read" in infos["broken"].problems[0]
    assert "none of the chat templates ('tool_use') is named 'default'" in infos["undecided"].problems[0]
    assert "chat_template must be a text, or a list" in infos["shapeless"].problems[0]
    assert {name for name, info in infos.items() if info.warnings} == {"grown"}


def test_tokens_of_a_slow_tokenizers_file_are_known(engine: Engine) -> None:
    assert ids_of(engine, "slow", "<tool>") == [258]
    assert len(ids_of(engine, None, "<tool>")) == len("<tool>")


def test_of_several_templates_the_default_is_used(engine: Engine) -> None:
    assert ids_of(engine, "listed", CHAT) == ids_of(engine, "template", CHAT)


def test_without_a_template_of_its_own_a_tokenizer_gets_the_bases(engine: Engine) -> None:
    assert engine.prompts.of(stack(engine, "untold")).has_chat_template
    rendered = "[user]hi\n[assistant]"
    assert ids_of(engine, "untold", CHAT) == reversed_tokenizer().encode(rendered).ids


def ids_of(engine: Engine, name: str | None, prompt: str | Chat) -> list[int]:
    return list(engine.prompts.of(stack(engine, *([] if name is None else [name]))).token_ids(prompt))


def stack(engine: Engine, *names: str) -> Stack:
    return Stack([(engine.adapters.registry.current(name), 1.0) for name in names])


def test_chats_go_through_the_adapters_own_template_and_tokenizer(engine: Engine) -> None:
    base = ids_of(engine, None, CHAT)
    assert ids_of(engine, "lora", CHAT) == ids_of(engine, "same", CHAT) == base
    assert ids_of(engine, "template", CHAT) == ids_of(engine, None, "<user>hi")
    both = ids_of(engine, "both", CHAT)
    assert both == reversed_tokenizer().encode("<user>hi").ids
    assert both != ids_of(engine, "template", CHAT)
    assert engine.prompts.of(stack(engine, "both")).decode(both) == "<user>hi"


def test_of_several_adapters_the_first_that_brings_any_counts(engine: Engine) -> None:
    def of(*names: str) -> list[int]:
        return list(engine.prompts.of(stack(engine, *names)).token_ids(CHAT))

    assert of("lora", "same") == ids_of(engine, None, CHAT)
    assert of("lora", "template", "both") == ids_of(engine, "template", CHAT)
    assert of("both", "template") == ids_of(engine, "both", CHAT)
    with pytest.raises(AdapterNotFound):
        engine.intake.resolve([AdapterRef("both"), AdapterRef("nobody")])
    assert engine.adapters.registry.get("both").running_requests == 0


def test_answers_are_in_the_adapters_own_tokens(engine: Engine) -> None:
    def answer(name: str, **response: object) -> tuple[str, list[int], list[str]]:
        request = Request(
            name,
            "hello",
            (AdapterRef(name),),
            stopping=StoppingParams(max_new_tokens=8, ignore_eos=True),
            response=ResponseParams(**response),
        )
        [outputs] = engine.generate([request])
        assert outputs[-1].finished is not None, outputs[-1].error
        return (
            "".join(output.text for output in outputs),
            [token for output in outputs for token in output.token_ids],
            [one.text for output in outputs for one in output.logprobs],
        )

    text, tokens, texts = answer("both", logprobs=True, echo=True)
    own = reversed_tokenizer()
    assert texts[:5] == list("hello")
    prompt = own.encode("hello").ids
    assert tokens == run_greedy(engine, [greedy("again", prompt, "lora", 8)])[0]
    assert text.startswith("hello")
    assert own.decode(tokens).startswith(text.removeprefix("hello").rstrip("\ufffd")[:1])
    plain, _, _ = answer("same")
    expected = run_greedy(engine, [greedy("plain", list(ids_of(engine, None, "hello")), "lora", 8)])[0]
    assert byte_tokenizer().decode(expected).startswith(plain[:1])


def test_the_tokenizers_end_of_sequence_ends_an_answer_too(engine: Engine) -> None:
    a = reversed_tokenizer().encode("A").ids[0]
    assert engine.prompts.of(stack(engine, "both")).eos_token_ids == (EOS, a)
    assert engine.prompts.of(stack(engine, "same")).eos_token_ids == (EOS,)
    generation = engine.intake.prepare(Request("e", "x", (AdapterRef("both"),)))
    assert generation.stop_token_ids == {EOS, a}
    generation.stack.release()


def test_scores_are_of_the_adapters_own_tokens(engine: Engine) -> None:
    [[output]] = engine.generate([ScoreRequest("s", "ab", ("cd",), (AdapterRef("both"),))])
    assert [token.token_id for token in output.scores[0].tokens] == reversed_tokenizer().encode("cd").ids
    assert [token.text for token in output.scores[0].tokens] == ["c", "d"]


def test_unloading_forgets_them(llama: Path, llama_store: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    shutil.copytree(llama_store / "lora", store / "lora")
    copy_of(store, "template", chat_template__jinja=TEMPLATE)
    engine = make_engine(llama, store)
    assert len(engine.prompts._own) == 1
    done: Future[object] = Future()
    engine.adapters.unload("template", done, wait=True)  # type: ignore[arg-type] # its outcome is of no interest
    engine.finish_background()
    assert done.done()
    assert not engine.prompts._own


def refused(engine: Engine, name: str | None, **fields: object) -> InvalidRequest:
    refs = () if name is None else (AdapterRef(name),)
    with pytest.raises(InvalidRequest) as caught:
        engine.intake.prepare(Request("refused", **{"prompt": "x", "adapters": refs, **fields}))  # type: ignore[arg-type]
    return caught.value


def test_ids_without_an_embedding_are_refused_and_nothing_else_is(engine: Engine) -> None:
    """Of the ids of "grown", 288 and up have no rows."""
    within, beyond = "<more-31>", "<more-32>"  # ids 287 and 288
    warning = engine.adapters.registry.get("grown").warnings[0]
    assert f"has ids up to {VOCABULARY + 255}, and there are embeddings for {VOCABULARY} tokens" in warning
    assert ids_of(engine, "grown", "a" + within)[-1] == VOCABULARY - 1
    chat = Chat((ChatMessage("user", beyond),))
    for field, fields in (
        ("prompt", {"prompt": "a" + beyond}),
        ("chat", {"prompt": chat}),
        ("token_ids.ids[1]", {"prompt": (1, VOCABULARY)}),
        ("stopping.stop_token_ids[0]", {"stopping": StoppingParams(stop_token_ids=(VOCABULARY,))}),
        (f"sampling.logit_bias[{VOCABULARY}]", {"sampling": SamplingParams(logit_bias=((VOCABULARY, 1.0),))}),
    ):
        error = refused(engine, "grown", **fields)
        assert error.field == field
        assert f"[0, {VOCABULARY})" in str(error)
    assert repr(beyond) in str(refused(engine, "grown", prompt=beyond))
    refs = (AdapterRef("grown"),)
    with pytest.raises(InvalidRequest, match=r"continuations\[1\]: holds the token '<more-40>' of id 296"):
        engine.intake.prepare_score(ScoreRequest("s", "a", ("b", "<more-40>"), refs))
    assert engine.adapters.registry.get("grown").running_requests == 0
    [outputs] = engine.generate([Request("g", within, refs, stopping=StoppingParams(max_new_tokens=2))])
    assert outputs[-1].finished is not None


def test_a_base_whose_tokenizer_has_more_ids_than_rows_is_served(llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<more-{at}>" for at in range(31)])
    tokenizer.add_special_tokens({"eos_token": "<end>"})  # 289: has no row either, so nothing ends in it
    tokenizer.save_pretrained(base)
    engine = make_engine(base)
    assert any("has ids up to 289" in note for note in engine.base.notes)
    assert engine.prompts.base.eos_token_ids == (EOS,)
    assert ids_of(engine, None, "<more-29>") == [VOCABULARY - 1]
    assert refused(engine, None, prompt="ab<more-30>").field == "prompt"
    assert refused(engine, None, prompt=Chat((ChatMessage("user", "<end>"),))).field == "chat"
    stopping = StoppingParams(max_new_tokens=3, min_new_tokens=2)
    [outputs] = engine.generate([Request("g", "x", stopping=stopping)])
    assert outputs[-1].finished is not None
