"""What an adapter brings along to be talked to is tried before it is served, and harms nobody when it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from polygraft.engine.engine import Engine
from polygraft.engine.sandbox import template_trials
from polygraft.errors import (
    AdapterInvalid,
    ChatTemplateFailed,
    ContextLengthExceeded,
    InvalidRequest,
    ResourceExhausted,
    TokenizerFailed,
)
from polygraft_types.adapters import AdapterState
from polygraft_types.requests import (
    AdapterRef,
    Chat,
    ChatMessage,
    Request,
    SamplingParams,
    ScoreRequest,
    StoppingParams,
)
from tests.engine.stores import copy_of, load
from tests.engines import make_engine
from tests.tiny import byte_tokenizer

FOREVER = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
LATER = "{% if messages | length > 3 %}" + FOREVER + "{% endif %}{{ messages[0].content }}"
CHAT = Chat((ChatMessage("user", "hi"),))
LONG = Chat((ChatMessage("user", "hi"),) * 4)


class Store:
    """A store whose only adapter is copied with other files."""

    def __init__(self, engine: Engine, root: Path, source: Path) -> None:
        self.engine = engine
        self.root = root
        self.source = source

    def load(self, name: str, **files: str | bytes) -> None:
        copy_of(self.source, self.root / name, "lora")
        for file, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            (self.root / name / "lora" / file.replace("__", ".")).write_bytes(data)
        load(self.engine, name, f"{name}/lora")

    def tokens(self, name: str, prompt: str | Chat) -> list[int]:
        stack = self.engine.intake.resolve([AdapterRef(name)])
        stack.release()
        return list(self.engine.prompts.of(stack).token_ids(prompt))

    def check_unused(self, name: str) -> None:
        assert self.engine.adapters.registry.get(name).running_requests == 0


@pytest.fixture(scope="module")
def shared(
    tiny_model: Callable[[str], Path],
    common_store: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Store:
    root = tmp_path_factory.mktemp("foreign")
    return Store(make_engine(tiny_model("llama"), root), root, common_store("llama"))


@pytest.fixture
def store(shared: Store) -> Store:
    shared.engine.prompts._workers._killed.clear()
    return shared


def tokenizer_json(**parts: object) -> str:
    return json.dumps({**json.loads(byte_tokenizer().backend_tokenizer.to_str()), **parts})


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"chat_template__jinja": FOREVER}, "used more than 1 s of CPU time"),
        ({"chat_template__jinja": "{{ 'x' * 10**9 }}"}, "memory"),
        ({"chat_template__jinja": "x\n{% for %}"}, r"can't be read \(line 2\): Expected an expression"),
        ({"chat_template__jinja": "x" * (template_trials.MAX_TEMPLATE_BYTES + 1)}, "262145 bytes, the limit is 262144"),
        ({"tokenizer_config__json": json.dumps({"chat_template": "\ud800"})}, "half a character"),
        ({"special_tokens_map__json": json.dumps({"x": "y" * 2**23})}, "8388617 bytes, the limit is 8388608"),
        ({"tokenizer_config__json": json.dumps({"bos_token": "y" * 2**18})}, "a token of 262144 characters"),
        ({"tokenizer__json": tokenizer_json(normalizer={"type": "Precompiled", "precompiled_charsmap": "AQAAAAA="})}, "index out of bounds"),
    ],
    ids=["three-loops", "memory", "syntax", "large", "surrogate", "large-map", "long-token", "panic"],
)  # fmt: skip
def test_what_takes_too_much_is_refused_when_it_is_loaded(
    store: Store, files: dict[str, str], problem: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(AdapterInvalid, match=problem):
        store.load(f"refused-{request.node.callspec.id}", **files)
    assert store.engine.adapters.registry.list() == [
        info for info in store.engine.adapters.registry.list() if info.state is AdapterState.READY
    ]


def test_a_template_is_tried_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = store.engine.prompts._workers
    with pytest.raises(AdapterInvalid, match="adapter 'tried-0'"):
        store.load("tried-0", chat_template__jinja=FOREVER + "once")
    store.load("tried-1", chat_template__jinja="tried once")
    monkeypatch.setattr(workers, "render", lambda *args: pytest.fail("tried again"))
    with pytest.raises(AdapterInvalid, match="adapter 'tried-2': its chat template used more than"):
        store.load("tried-2", chat_template__jinja=FOREVER + "once")
    store.load("tried-3", chat_template__jinja="tried once")


def test_the_engine_starts_whatever_is_in_the_store(llama: Path, llama_store: Path, tmp_path: Path) -> None:
    panics = {"type": "Precompiled", "precompiled_charsmap": "AQAAAAA="}
    padding = {
        "strategy": {"Fixed": 2**36}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    for name, parts in {
        "panics": {"normalizer": panics},
        "prepends": {"normalizer": {"type": "Prepend", "prepend": "b" * 10**8}},
        "pads": {"padding": padding},
    }.items():
        copy_of(llama_store, tmp_path / "aside", "lora")
        (tmp_path / "aside" / "lora").rename(tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text(tokenizer_json(**parts))
    (tmp_path / "aside").rmdir()
    engine = make_engine(llama, tmp_path)
    states = {info.name: info.state.value for info in engine.adapters.registry.list()}
    assert states == {"panics": "FAILED", "prepends": "FAILED", "pads": "READY"}
    prompts = engine.prompts.of(engine.intake.resolve([AdapterRef("pads")]))
    assert list(prompts.token_ids("hi")) == byte_tokenizer()("hi")["input_ids"]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("x\n{{ 1 / 0 }}", "of adapter 'fails-.*' fails in line 2: ZeroDivisionError"),
        ("{{ '%c' | format(2**40) }}", "in line 1: OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "in line 1: RecursionError"),
        ("{{ 'x'.encode('none') }}", "in line 1: LookupError"),
        ("{{ nothing.at.all }}", "in line 1: UndefinedError"),
        ("{{ '\\ud800' }}", "UnicodeEncodeError"),
    ],
    ids=["zero", "overflow", "recursion", "lookup", "undefined", "surrogate"],
)
def test_a_template_that_fails_says_where_and_lets_go_of_its_adapter(
    store: Store, template: str, problem: str, request: pytest.FixtureRequest
) -> None:
    name = f"fails-{request.node.callspec.id}"
    store.load(name, chat_template__jinja=template)
    warnings = store.engine.adapters.registry.get(name).warnings
    assert any("fails with a small chat" in warning for warning in warnings)
    ref = (AdapterRef(name),)
    with pytest.raises(ChatTemplateFailed, match=problem):
        store.engine.intake.prepare(Request("r", CHAT, ref))
    with pytest.raises(ChatTemplateFailed, match=problem):
        store.engine.intake.prepare_score(ScoreRequest("s", CHAT, ("x",), ref))
    store.check_unused(name)
    store.engine.generate([Request("t", "text", ref, stopping=StoppingParams(max_new_tokens=1))])
    store.check_unused(name)


def test_a_template_that_takes_long_with_some_chats_is_ended(store: Store) -> None:
    store.load("later", chat_template__jinja=LATER)
    with pytest.raises(
        ChatTemplateFailed, match="of adapter 'later' fails: it used more than 2 s of CPU time"
    ):
        store.engine.intake.prepare(Request("r", LONG, (AdapterRef("later"),)))
    store.check_unused("later")
    assert store.tokens("later", CHAT) == byte_tokenizer()("hi")["input_ids"]


def test_what_comes_of_a_template_has_the_contexts_limit(store: Store) -> None:
    store.load("wordy", chat_template__jinja="{{ 'x' * (messages | length) ** 9 }}")
    with pytest.raises(ContextLengthExceeded, match="chat: more than the "):
        store.tokens("wordy", LONG)


def test_a_template_may_refuse(store: Store) -> None:
    store.load(
        "refuses",
        chat_template__jinja="{% if messages | length > 3 %}{{ raise_exception('no\nmore') }}{% endif %}ok",
    )
    with pytest.raises(
        InvalidRequest, match=r"chat.messages: the chat template of adapter 'refuses' refuses them: no\\n"
    ):
        store.tokens("refuses", LONG)
    assert store.tokens("refuses", CHAT) == byte_tokenizer()("ok")["input_ids"]


def test_the_bases_own_template_needs_no_process(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    own = byte_tokenizer()
    store.load(
        "same",
        tokenizer__json=tokenizer_json(),
        tokenizer_config__json=json.dumps({"chat_template": own.chat_template}),
    )
    monkeypatch.setattr(store.engine.prompts._workers, "render", lambda *args: pytest.fail("asked"))
    assert store.tokens("same", CHAT)


def test_no_process_for_a_template(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.load("alone", chat_template__jinja="x")
    workers = store.engine.prompts._workers
    workers.end()
    monkeypatch.setattr("polygraft.engine.sandbox.process.sys.executable", "/nowhere/python")
    with pytest.raises(ResourceExhausted, match="can be started"):
        store.engine.intake.prepare(Request("r", CHAT, (AdapterRef("alone"),)))
    store.check_unused("alone")


def test_a_tokenizer_that_panics_with_some_texts_fails_these_alone(store: Store) -> None:
    store.load("normal", tokenizer__json=tokenizer_json(pre_tokenizer=None))
    own = store.engine.prompts._own[store.engine.adapters.registry.current("normal").generation]
    bad = Tokenizer.from_str(tokenizer_json(decoder={"type": "Strip", "content": "a", "start": 5, "stop": 5}))
    object.__setattr__(own._tokenizer, "backend", bad)
    own.texts._backend = bad
    ref = (AdapterRef("normal"),)
    stopping = StoppingParams(max_new_tokens=4, ignore_eos=True)
    [a] = byte_tokenizer()("a")["input_ids"]
    panics = Request(
        "panics", (1, 2, 3), ref, sampling=SamplingParams(logit_bias=((a, 100.0),)), stopping=stopping
    )
    scores = ScoreRequest("scores", (1, 2, 3), ((a,),), ref)
    fine = Request("fine", (1, 2, 3), stopping=stopping)
    failed, scored, good = store.engine.generate([panics, scores, fine])
    assert isinstance(failed[-1].error, TokenizerFailed)
    assert scored[-1].scores[0].tokens[0].text == "\ufffd"
    assert good[-1].finished is not None
    store.check_unused("normal")
    store.engine.check_integrity()
