"""What is refused at the door, before it holds anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from polygraft.engine.engine import Engine
from polygraft.engine.requests import input_processor
from polygraft.errors import (
    AdapterNotFound,
    AdapterUnavailable,
    ConfigError,
    ContextLengthExceeded,
    InvalidRequest,
    PolygraftError,
)
from polygraft_types.requests import AdapterRef, LoraPath, Request, ScoreRequest
from tests.engine.asking import PROMPT, request, tokens_of
from tests.engines import greedy, make_engine, run_greedy
from tests.tiny import VOCABULARY


@pytest.mark.parametrize(
    ("adapter", "prompt", "new", "text"),
    [
        (None, 200, 57, "200 prompt tokens + 57 new tokens = 257, the context holds 256"),
        (None, 256, None, "256 prompt tokens + 1 new tokens = 257, the context holds 256"),
        (
            "prefix",
            200,
            52,
            "5 virtual tokens + 200 prompt tokens + 52 new tokens = 257, the context holds 256",
        ),
        ("p-tuning", 240, None, "17 virtual tokens + 240 prompt tokens + 1 new tokens = 258"),
    ],
)
def test_beyond_the_context_is_refused_with_the_numbers(
    engine: Engine, adapter: str | None, prompt: int, new: int | None, text: str
) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        engine.submit(request([1] * prompt, adapter, max_new_tokens=new))
    assert text in str(caught.value)
    assert caught.value.field == "prompt"


def test_beyond_the_cache_is_refused_with_the_numbers(llama: Path, llama_store: Path) -> None:
    # Blocks of 16 tokens of 3 layers x 2 heads x (16 + 16) floats: 12,288 bytes each.
    engine = make_engine(llama, llama_store, kv_cache_bytes=5 * 12_288)
    assert engine.scheduler.pool.num_blocks == 5
    with pytest.raises(
        ContextLengthExceeded,
        match=r"60 prompt tokens \+ 21 new tokens = 81, the KV cache holds 80 \(--kv-cache-bytes\)",
    ):
        engine.submit(request([1] * 60, max_new_tokens=21))
    with pytest.raises(ContextLengthExceeded, match="5 virtual tokens"):
        engine.submit(request([1] * 60, "prefix", max_new_tokens=5))
    run_greedy(engine, [greedy("fits", [1] * 60, None, 20), greedy("too", [1] * 60, "prefix", 4)])


def test_a_cache_that_holds_no_block(llama: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--kv-cache-bytes: 12287 bytes don't hold one block of 12288 bytes"
    ):
        make_engine(llama, kv_cache_bytes=12_287)


def test_an_id_that_is_running_already(engine: Engine) -> None:
    engine.submit(greedy("r", PROMPT, "lora", 3))
    with pytest.raises(InvalidRequest, match="request_id: 'r' is running already"):
        engine.submit(greedy("r", PROMPT, "lora", 3))
    assert engine.adapters.registry.get("lora").running_requests == 1
    while engine.has_work:
        engine.step()


REFUSED: list[tuple[Request, type[PolygraftError], str]] = [
    (request(PROMPT, "nobody"), AdapterNotFound, "adapter 'nobody': not registered"),
    (request([], "lora"), InvalidRequest, "token_ids.ids: must not be empty"),
    (request("", "lora"), InvalidRequest, "prompt: must not be empty"),
    (request([0, VOCABULARY], "lora"), InvalidRequest, r"token_ids.ids\[1\]: must be in \[0, 288\), got 288"),
    (request([-1], "lora"), InvalidRequest, r"token_ids.ids\[0\]: must be in \[0, 288\), got -1"),
    (request(PROMPT, "lora", stop_token_ids=(1, 999)), InvalidRequest, r"stopping.stop_token_ids\[1\]: .* got 999"),
    (request(PROMPT, "lora", max_new_tokens=300), ContextLengthExceeded, "prompt: "),
    (request(PROMPT, "lora", max_new_tokens=3, min_new_tokens=4), InvalidRequest, "min_new_tokens: .* at most"),
    (Request("r", (1,), (), LoraPath.MERGED, True), InvalidRequest, "lora_path: MERGED needs an adapter"),
    (Request("r", (1,), (AdapterRef("prefix"),), LoraPath.MERGED, True), AdapterUnavailable, "'prefix': prefix_tuning has virtual tokens"),
    (Request("r", (1,), (AdapterRef("prompt"),), LoraPath.MERGED, True), AdapterUnavailable, "'prompt': prompt_tuning has virtual tokens"),
    (Request("r", (1,), (AdapterRef("lora", generation=10**6),)), AdapterNotFound, "generation 1000000 isn't loaded"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "error", "text"), REFUSED, ids=[text for *_, text in REFUSED])
def test_a_refused_request_holds_nothing_and_disturbs_nobody(
    engine: Engine, bad: Request, error: type[PolygraftError], text: str
) -> None:
    expected = run_greedy(engine, [greedy("good", PROMPT, "lora", 5)])
    engine.submit(greedy("good", PROMPT, "lora", 5))
    outputs = engine.step().outputs
    before = engine.adapters.registry.get("lora").running_requests
    with pytest.raises(error, match=text):
        engine.submit(bad)
    assert engine.adapters.registry.get("lora").running_requests == before
    while engine.has_work:
        outputs += engine.step().outputs
    assert [tokens_of(outputs)] == expected


class Unexpected(BaseException):
    """As a panic in Rust, or an interrupt."""


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError(), OverflowError(), RecursionError(), LookupError(), MemoryError(), Unexpected()],
    ids=lambda error: type(error).__name__,
)
def test_whatever_ends_a_request_at_the_door_it_holds_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(engine.prompts.base, "token_ids", fail)
    monkeypatch.setattr(engine.prompts.base, "pairs", fail)
    two = (AdapterRef("ia3"), AdapterRef("lora"))
    with pytest.raises(type(error)):
        engine.intake.prepare(Request("r", "x", two))
    with pytest.raises(type(error)):
        engine.intake.prepare_score(ScoreRequest("s", "x", ("y",), two))
    monkeypatch.setattr(input_processor, "check_stack", fail)
    with pytest.raises(type(error)):
        engine.intake.resolve(two)
    assert engine.adapters.registry.get("lora").running_requests == 0
    assert engine.adapters.registry.get("ia3").running_requests == 0
