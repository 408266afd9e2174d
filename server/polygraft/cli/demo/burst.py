"""The requests of the demo, and sending them all at once."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from polygraft.errors import ConfigError
from polygraft_client import Adapter, AsyncClient, GenerateOptions, Generation

BASE = ""
"""The name of no adapter."""

ANY_PROMPT = "Describe the sea in one sentence."
"""What an adapter is asked that the file of prompts doesn't name."""

OnTokens = Callable[[int, int, bool], None]
"""Told of a request (its index), its tokens so far and whether these are all."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request; `kind` is "" for the base."""

    adapter: str
    kind: str
    prompt: str
    stream: bool


@dataclass(frozen=True, slots=True)
class Burst:
    """What came of the requests, in their order; `seconds` is from the first sent to the last answered."""

    asks: tuple[Ask, ...]
    answers: tuple[Generation, ...]
    seconds: float


def read_prompts(path: Path) -> dict[str, list[str]]:
    """Read the prompts of each adapter from `[{"adapter": NAME, "prompt": TEXT}, …]`.

    Raises:
        ConfigError: the file is missing or holds something else.
    """
    prompts: dict[str, list[str]] = {}
    try:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            prompts.setdefault(entry["adapter"], []).append(entry["prompt"])
    except FileNotFoundError:
        raise ConfigError("--adapters", f"no such file: {path}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError("--adapters", f"{path}: expected a list of adapter and prompt: {error!r}") from None
    return prompts


async def with_template(client: AsyncClient, adapters: Iterable[Adapter]) -> set[str]:
    """The adapters, possibly `BASE`, that have a chat template. Raises what the client raises."""
    names = (BASE, *(adapter.name for adapter in adapters))
    return {name for name in names if (await client.model(adapter=name)).has_chat_template}


def plan(adapters: Iterable[Adapter], prompts: Mapping[str, Sequence[str]]) -> tuple[Ask, ...]:
    """Ask every adapter its prompts, and the base each of them; the adapters stream."""
    asks = [
        Ask(adapter.name, adapter.kind, prompt, stream=True)
        for adapter in adapters
        for prompt in prompts.get(adapter.name, (ANY_PROMPT,))
    ]
    distinct = dict.fromkeys(ask.prompt for ask in asks)
    return (*asks, *(Ask(BASE, "", prompt, stream=False) for prompt in distinct))


async def send(
    client: AsyncClient,
    asks: Sequence[Ask],
    *,
    max_new_tokens: int,
    chats: Collection[str],
    on_tokens: OnTokens,
) -> Burst:
    """Send all requests at the same time and wait for every answer; raises what the client raises.

    Args:
        chats: the adapters, possibly `BASE`, that have a chat template; the others get bare text.
    """

    async def one(index: int, ask: Ask) -> Generation:
        options: GenerateOptions = {
            "adapter": ask.adapter,
            "temperature": 0.0,
            "max_new_tokens": max_new_tokens,
            "return_token_ids": True,
        }
        bare: str | None = ask.prompt
        if ask.adapter in chats:
            options["chat"], bare = [{"role": "user", "content": ask.prompt}], None
        if ask.stream:
            async with client.stream(bare, **options) as stream:
                tokens = 0
                async for chunk in stream:
                    tokens += len(chunk.token_ids)
                    on_tokens(index, tokens, False)
                answer = await stream.until_done()
        else:
            answer = await client.generate(bare, **options)
        on_tokens(index, answer.usage.completion_tokens, True)
        return answer

    started = time.perf_counter()
    answers = await asyncio.gather(*(one(index, ask) for index, ask in enumerate(asks)))
    return Burst(tuple(asks), tuple(answers), time.perf_counter() - started)
