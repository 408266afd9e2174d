"""Requests of every kind and every end, and what their clients see of them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Unpack

from polygraft_client import (
    Adapter,
    AsyncClient,
    GenerateOptions,
    Generation,
    InvalidArgument,
    LoraPath,
    NotFound,
)

LONG_TOKENS = 120
"""What the requests of the second burst generate that must be served together."""

CODES: dict[type[Exception], str] = {InvalidArgument: "INVALID_ARGUMENT", NotFound: "NOT_FOUND"}


@dataclass(frozen=True, slots=True)
class Ask:
    """One request; `kind` is the adapter's, "base" without one.

    Args:
        cancel_after: tokens after which the client leaves; None stays to the end.
    """

    adapter: str
    kind: str
    prompt: str
    options: GenerateOptions = field(default_factory=GenerateOptions)
    cancel_after: int | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """What a client saw of its request.

    Args:
        first_token, end: moments of `time.monotonic()`; the first is meaningless without `tokens`.
        answer: None if the client left.
    """

    ask: Ask
    first_token: float
    end: float
    seconds_to_first_token: float
    tokens: int
    answer: Generation | None

    @property
    def finish_reason(self) -> str:
        """As the metrics have it."""
        return self.answer.finish_reason if self.answer else "CANCELLED"

    @property
    def path(self) -> str:
        """As the metrics have it; a client that leaves isn't told."""
        return self.answer.lora_path if self.answer else ""

    @property
    def computed_rows(self) -> int:
        """Rows that the base ran for it: its prompt where the cache hadn't it, and each token but the last."""
        assert self.answer is not None
        usage = self.answer.usage
        return usage.prompt_tokens - usage.cached_tokens + usage.completion_tokens - 1


def counted(
    seen: Iterable[Seen], key: Callable[[Seen], tuple[str, ...]], count: Callable[[Seen], int]
) -> dict[tuple[str, ...], float]:
    """A sum over requests, as a query gives it."""
    total: dict[tuple[str, ...], float] = {}
    for each in seen:
        total[key(each)] = total.get(key(each), 0) + count(each)
    return total


def of_adapter(seen: Seen) -> tuple[str, str]:
    """Labels of most metrics."""
    return seen.ask.adapter, seen.ask.kind


def ask_of(of: Adapter | None, **options: Unpack[GenerateOptions]) -> Ask:
    """A short request for an adapter or the base."""
    name, kind = (of.name, of.kind) if of else ("", "base")
    return Ask(
        name, kind, f"Tell {name or 'us'} of the sea.", {"max_new_tokens": 8, "ignore_eos": True, **options}
    )


def by_the_merged_path(adapters: Iterable[Adapter]) -> list[Ask]:
    return [ask_of(a, lora_path=LoraPath.MERGED) for a in adapters if a.kind == "lora" and a.mergeable]


def first_burst(adapters: list[Adapter]) -> list[Ask]:
    """Everybody once, and some again."""
    everybody = [ask_of(adapter) for adapter in (None, *adapters)]
    return [*everybody, *everybody[:3]]


def second_burst(adapters: list[Adapter], first: list[Seen]) -> list[Ask]:
    """So long that all are served together; and one for each end that there is."""
    # A step has one path, so they all say which.
    long = [ask_of(a, max_new_tokens=LONG_TOKENS, lora_path=LoraPath.UNMERGED) for a in (None, *adapters)]
    # Greedy answers begin as they did before, so what ends them is known.
    before = {seen.ask.adapter: seen.answer for seen in first if seen.answer}
    wordy = next(adapter for adapter in adapters if adapter.name in before and before[adapter.name].text)
    ends = [
        ask_of(None, stop_token_ids=before[""].token_ids[1:2]),
        ask_of(wordy, stop=before[wordy.name].text[0]),
        ask_of(adapters[0], max_new_tokens=200, time_limit=0.05),
    ]
    leaver = replace(ask_of(adapters[2], max_new_tokens=200), cancel_after=3)
    return [*long, *ends, leaver]


async def _one(client: AsyncClient, ask: Ask) -> Seen:
    started = time.monotonic()
    first = 0.0
    tokens = 0
    options: GenerateOptions = {
        "adapter": ask.adapter,
        "temperature": 0.0,
        "return_token_ids": True,
        **ask.options,
    }
    async with client.stream(ask.prompt, **options) as stream:
        async for chunk in stream:
            first = first or time.monotonic()
            tokens += len(chunk.token_ids)
            if ask.cancel_after is not None and tokens >= ask.cancel_after:
                break
        answer = stream.generation
    return Seen(ask, first, time.monotonic(), first - started, tokens, answer)


def send(address: str, asks: Sequence[Ask]) -> list[Seen]:
    """Send all at the same time and wait for every end."""

    async def burst() -> list[Seen]:
        async with AsyncClient(address) as client:
            return list(await asyncio.gather(*(_one(client, ask) for ask in asks)))

    return asyncio.run(burst())


def send_bad(address: str) -> Counter[str]:
    """Calls that must be refused; how many by the status code that the client got."""
    seen: Counter[str] = Counter()

    async def calls() -> None:
        async with AsyncClient(address) as client:
            for call in (
                client.generate("hi", adapter="nobody"),
                client.generate("hi", adapter="no-one"),
                client.generate(""),
                client.adapters.load("broken"),
            ):
                try:
                    await call
                except tuple(CODES) as error:
                    seen[CODES[type(error)]] += 1

    asyncio.run(calls())
    return seen
