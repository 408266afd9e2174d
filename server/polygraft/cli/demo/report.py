"""What the demo shows at its end."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from rich.console import Group
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from polygraft.cli.demo.burst import BASE, Burst
from polygraft.cli.demo.scrape import Scrape
from polygraft_client import FinishReason, Generation, Model

BASE_KIND = "base"
"""The metrics' kind for rows without an adapter."""


def side_by_side(burst: Burst) -> Group:
    """For each prompt, the base's answer and below it those of the adapters."""
    tables: list[Table | Text] = []
    for prompt in dict.fromkeys(ask.prompt for ask in burst.asks):
        table = Table(title=Text(f"“{prompt}”"), title_justify="left", title_style="bold", box=None)
        table.show_header = False
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, style="dim")
        table.add_column(overflow="fold")
        answered = [pair for pair in zip(burst.asks, burst.answers, strict=True) if pair[0].prompt == prompt]
        for ask, answer in sorted(answered, key=lambda pair: pair[0].adapter != BASE):
            table.add_row(*map(Text, (ask.adapter or "base model", ask.kind, shown(answer))))
        tables += [table, Text()]
    return Group(*tables)


def shown(answer: Generation) -> str:
    """An answer's text, marked where the limit cut it."""
    text = answer.text.strip()
    return f"{text} …" if answer.finish_reason is FinishReason.LENGTH else text


def lines(burst: Burst, scraped: Scrape, model: Model) -> Iterator[str]:
    """The figures: sharing, speed and memory."""
    yield f"Sharing: {sharing(scraped.widest_step)}."
    tokens = sum(answer.usage.completion_tokens for answer in burst.answers)
    first = median(answer.timings.time_to_first_token for answer in burst.answers)
    yield (
        f"Speed: {len(burst.asks)} requests, {tokens} tokens in {burst.seconds:.1f} s "
        f"({tokens / burst.seconds:.0f} tokens/s); median time to first token {first * 1000:.0f} ms."
    )
    adapters = len({ask.adapter for ask in burst.asks if ask.adapter != BASE})
    copies = model.weight_bytes * (adapters + 1)
    yield (
        f"Memory: the whole server takes {decimal(scraped.resident_bytes)}; the weights alone of "
        f"{adapters + 1} models, one for each adapter and the base, would take {decimal(copies)}."
    )


def sharing(widest: dict[str, int]) -> str:
    """Say which adapters shared the widest step."""
    kinds = {kind: count for kind, count in sorted(widest.items()) if kind != BASE_KIND and count}
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"
    base = " and the base model" if widest.get(BASE_KIND) else ""
    return f"one step served {sum(kinds.values())} distinct adapters ({listed}){base} together"
