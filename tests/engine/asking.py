"""Requests to an engine, and what came of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polygraft.core.output import RequestOutput
from polygraft.engine.engine import Engine
from polygraft_types.answers import Finished
from polygraft_types.requests import AdapterRef, Request, StoppingParams

PROMPT = list(range(30, 60))


def check_clean(engine: Engine) -> None:
    assert not engine.has_work
    engine.check_integrity()
    assert all(info.running_requests == 0 for info in engine.adapters.registry.list())
    held = len(list(engine.scheduler.prefixes.held_blocks()))
    assert engine.scheduler.pool.used == held


def request(
    prompt: str | list[int] = "hello", adapter: str | None = None, id: str = "r", **stopping: Any
) -> Request:
    return Request(
        id,
        prompt if isinstance(prompt, str) else tuple(prompt),
        adapters=() if adapter is None else (AdapterRef(adapter),),
        stopping=StoppingParams(**stopping),
    )


def run(engine: Engine, *requests: Request) -> list[tuple[str, list[int], Finished]]:
    """Text, tokens and end of each."""
    ends = []
    for outputs in engine.generate(requests):
        assert [output.terminal for output in outputs].count(True) == 1
        finished = outputs[-1].finished
        assert finished is not None, outputs[-1].error
        ends.append((text_of(outputs), tokens_of(outputs), finished))
    return ends


def text_of(outputs: Sequence[RequestOutput]) -> str:
    return "".join(output.text for output in outputs)


def tokens_of(outputs: Sequence[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]
