"""The load generator from start to end."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from polygraft.cli.bench import report
from polygraft.cli.bench.plan import BASE, Choice, Load, plan
from polygraft.cli.bench.run import closed_loop, open_loop
from polygraft.cli.options import DEFAULT_SERVER, PATHS, AsJson, OfferedPath, Server, Token, console, to_json
from polygraft.errors import ConfigError
from polygraft_client import AdapterState, AsyncClient, LoraPath


def bench(
    context: typer.Context,
    requests: Annotated[int, typer.Option(metavar="N", min=1, help="Requests to measure.")] = 64,
    concurrency: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Requests in flight; the next is sent when one ends (closed loop)."
        ),
    ] = 16,
    rate: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0.001,
            help="Send X requests per second at random times instead, whatever is running (open loop).",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help='Adapter to use, "" for the base; repeatable. [default: all that are ready]'
        ),
    ] = None,
    choice: Annotated[
        Choice,
        typer.Option(
            metavar="[uniform|zipf]", help="How requests are spread over the adapters, in the order given."
        ),
    ] = Choice.UNIFORM,
    zipf_exponent: Annotated[
        float, typer.Option(metavar="X", min=0.0, help="Exponent of --choice zipf.")
    ] = 1.0,
    prompt_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Random tokens in each prompt.")
    ] = 64,
    shared_tokens: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Of these, tokens that all requests share, like a system prompt."
        ),
    ] = 0,
    new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens in each answer, exactly.")] = 64,
    warmup: Annotated[int, typer.Option(metavar="N", min=0, help="Requests before the measured ones.")] = 16,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of prompts, adapters and times.")] = 0,
    lora_path: Annotated[
        OfferedPath | None,
        typer.Option(metavar=PATHS, case_sensitive=False, help="How LoRA runs. [default: the server's]"),
    ] = None,
    server: Server = DEFAULT_SERVER,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Put load on a running server, and show throughput and latencies.

    The exit status is 1 if a request failed.
    """
    if context.invoked_subcommand is not None:
        return
    if shared_tokens > prompt_tokens:
        raise ConfigError("--shared-tokens", f"{shared_tokens} is more than --prompt-tokens {prompt_tokens}")

    async def run() -> report.Report:
        async with AsyncClient(server, token=token) as client:
            names = adapter if adapter else await _ready(client)
            for name in dict.fromkeys(filter(None, adapter or ())):
                await client.model(adapter=name)  # raises before any load if it can't be used
            model = await client.model()
            load = Load(
                names, choice, zipf_exponent, prompt_tokens, new_tokens, shared_tokens, rate,
                model.vocabulary_size, seed, None if lora_path is None else LoraPath(lora_path.upper()),
            )  # fmt: skip
            planned = plan(load)
            with Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                disable=as_json,
            ) as progress:
                bar = progress.add_task("warm-up", total=warmup)
                # Always closed: it brings adapters and caches to where a busy server has them.
                await closed_loop(
                    client, planned, warmup, concurrency, new_tokens, lambda _: progress.advance(bar)
                )
                bar = progress.add_task("measured", total=requests)
                started = time.perf_counter()
                if rate is None:
                    results = await closed_loop(
                        client, planned, requests, concurrency, new_tokens, lambda _: progress.advance(bar)
                    )
                else:
                    # Its times begin anew.
                    results = await open_loop(
                        client, plan(load), requests, new_tokens, lambda _: progress.advance(bar)
                    )
                return report.summarise(results, time.perf_counter() - started)

    result = asyncio.run(run())
    if as_json:
        print(to_json(result))
    else:
        out = console()
        out.print(report.summary(result), markup=False, highlight=False, soft_wrap=True)
        out.print(report.table(result))
    if result.errors:
        raise typer.Exit(1)


async def _ready(client: AsyncClient) -> list[str]:
    """Names of the adapters that are ready; the base alone if there are none."""
    names = [found.name async for found in client.adapters.list() if found.state is AdapterState.READY]
    return names or [BASE]
