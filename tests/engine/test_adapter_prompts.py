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
from polygraft.engine.request import (
    AdapterRef,
    Chat,
    ChatMessage,
    Request,
    ResponseParams,
    ScoreRequest,
    StoppingParams,
)
from polygraft.errors import AdapterNotFound
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
    copy_of(store, "listed", tokenizer_config__json={"chat_template": [{"name": "a", "template": "b"}]})
    return make_engine(llama, store)


def test_who_has_a_way_of_its_own(engine: Engine) -> None:
    infos = {info.name: info for info in engine.adapters.registry.list()}
    assert {name for name, info in infos.items() if info.own_prompts} == {"template", "both"}
    assert (
        f"ids up to {VOCABULARY + 255}, and there are embeddings for {VOCABULARY} tokens"
        in infos["grown"].problems[0]
    )
    assert "tokenizer.json can't be read" in infos["broken"].problems[0]
    assert "several chat templates" in infos["listed"].problems[0]


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
    generation = engine.prepare(Request("e", "x", (AdapterRef("both"),)))
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
