"""Which thread prepares what: small requests the loop's own, all others one that suits them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from polygraft.engine.engine import Engine
from polygraft.engine.requests.input_processor import Intake
from polygraft.engine.requests.preparation import LARGE, QUICK, Preparation
from polygraft.errors import InvalidRequest
from polygraft_types.requests import AdapterRef, Chat, ChatMessage, Request, ScoreRequest
from tests.engine.asking import check_clean

OWN = "prompts of adapters' own tokenizers and templates"


class Fake:
    """An intake that tells which thread it is asked on."""

    def may_bring_prompts(self, ref: AdapterRef) -> bool:
        return ref.name == "own" or ref.generation is not None

    def prepare(self, request: object) -> str:
        return threading.current_thread().name

    prepare_score = prepare


CASES = {
    "text": (Request("r", "x" * QUICK), ""),
    "more text": (Request("r", "x" * (QUICK + 1)), "prompts"),
    "much text": (Request("r", "x" * LARGE), "large prompts"),
    "ids": (Request("r", (1,) * QUICK), ""),
    "many ids": (Request("r", (1,) * (5 * QUICK)), "prompts"),
    "a chat": (Request("r", Chat((ChatMessage("user", "hi"),) * 9)), ""),
    "a chat of many messages": (Request("r", Chat((ChatMessage("user", "hi"),) * 90)), "prompts"),
    "a chat of too many messages": (Request("r", Chat((ChatMessage("user", "hi"),) * 2000)), "large prompts"),
    "an adapter with the base's tokenizer": (Request("r", "x", (AdapterRef("plain"),)), ""),
    "an adapter with its own": (Request("r", "x", (AdapterRef("plain"), AdapterRef("own"))), OWN),
    "perhaps an older one with its own": (Request("r", "x", (AdapterRef("plain", generation=3),)), OWN),
    "an adapter that isn't there": (Request("r", "x", (AdapterRef("nobody"),)), ""),
    "scores": (ScoreRequest("r", "x" * 100, ("y",) * 10), ""),
    "a prompt with many continuations": (ScoreRequest("r", "x" * 1000, ("y",) * 10), "prompts"),
    "a long prompt with many continuations": (ScoreRequest("r", "x" * 1000, ("y",) * 256), "large prompts"),
    "continuations of ids": (ScoreRequest("r", "x" * 1000, ((1,),) * 256), ""),
}


@pytest.mark.parametrize("name", CASES)
async def test_who_prepares_it(name: str) -> None:
    request, expected = CASES[name]
    preparation = Preparation(cast("Intake", Fake()), 10)
    prepare = preparation.score if isinstance(request, ScoreRequest) else preparation.generation
    assert await prepare(request) == (expected or threading.current_thread().name)  # type: ignore[arg-type]
    assert not len(preparation)


async def test_more_than_one_request_may_have_tokenized() -> None:
    preparation = Preparation(cast("Intake", Fake()), 10)
    with pytest.raises(InvalidRequest, match=r"continuations: .* send fewer at a time"):
        await preparation.score(ScoreRequest("r", "x" * 70_000, ("y",) * 256))
    ids = ScoreRequest("r", (1,) * 70_000, ("y",) * 256)
    assert await preparation.score(ids) == "large prompts"  # type: ignore[comparison-overlap]


def test_texts_of_log_probabilities_are_found_step_by_step(
    shared: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As many as there are rows in a step, and not those of a whole prompt at its end."""
    engine = shared()
    engine.scheduler.max_num_batched_tokens = 16
    texts = engine.prompts.base.texts
    described: list[int] = []
    real = texts.describe

    def describe(found: Any) -> Any:
        described.append(len(found))
        return real(found)

    monkeypatch.setattr(texts, "describe", describe)
    try:
        echo = Request("echo", tuple(range(30, 130)), response=cast("Any", SimpleNamespace(
            echo=True, logprobs=True, top_logprobs=2, wants_logprobs=True)))  # fmt: skip
        score = ScoreRequest("score", (1, 2), (tuple(range(100)),), top_logprobs=2)
        outputs = engine.generate([echo, score])
    finally:
        engine.scheduler.max_num_batched_tokens = engine.config.max_num_batched_tokens
    assert max(described) <= 16
    assert sum(described) >= 199
    assert len(outputs[0][0].logprobs) == 101
    assert len(outputs[1][-1].scores[0].tokens) == 100
    check_clean(engine)
