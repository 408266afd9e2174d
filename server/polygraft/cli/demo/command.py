"""The demo from start to end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Never

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from polygraft.cli.demo import report
from polygraft.cli.demo.burst import Burst, plan, read_prompts, send, with_template
from polygraft.cli.demo.display import TokenDisplay
from polygraft.cli.demo.launcher import Addresses, ServerFailed, ServerProcess, serve_command
from polygraft.cli.demo.samples import PROMPTS_FILE, sample_adapters
from polygraft.cli.demo.scrape import scrape
from polygraft.cli.extras import require_server
from polygraft.cli.options import Token, console
from polygraft_client import AdapterState, AsyncClient, Model, PolygraftError

READY_SECONDS = 300.0  # of a cold start on a slow disk; a warm one takes a few seconds
CALL_SECONDS = 300.0
TERMINATED = 143  # the shells' own status for SIGTERM


def demo(
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="Base model: `default`, a local folder or a hub id.")
    ] = "default",
    adapters: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help=f"Folder of adapters, with prompts for them in {PROMPTS_FILE}. [default: the samples that "
            "are installed with Polygraft, or all of a clone's]",
        ),
    ] = None,
    kv_cache_bytes: Annotated[str, typer.Option(metavar="BYTES", help="Memory of the KV cache.")] = "128MiB",
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Most tokens of each answer.")] = 48,
    token: Token = None,
) -> None:
    """Start a server, send it requests for all adapters at once, show the answers, and stop it."""
    require_server("polygraft demo")
    if adapters is None:
        adapters = sample_adapters()
    prompts = read_prompts(adapters / PROMPTS_FILE)
    if model == "default":
        from polygraft.base.default_model import ensure_default_model, show_progress

        with _ended_by_sigterm(), show_progress() as report_phase:
            ensure_default_model(report=report_phase)  # here, since the server would only log it
    command = serve_command("--model", model, "--adapters", str(adapters), "--kv-cache-bytes", kv_cache_bytes)
    out = console()
    with _ended_by_sigterm(), ServerProcess(command) as server:
        try:
            addresses = _wait_ready(server, out)
            burst, served = asyncio.run(_run(addresses, prompts, max_new_tokens, token, out))
            scraped = scrape(addresses.metrics)
            server.stop()
        except (ServerFailed, PolygraftError, OSError):
            Console(stderr=True).print("The server's last lines:", *server.log, sep="\n", markup=False)
            raise
    out.print(report.side_by_side(burst))
    for line in report.lines(burst, scraped, served):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _wait_ready(server: ServerProcess, out: Console) -> Addresses:
    """Show that the server is loading, and on a terminal what it says meanwhile."""
    if not out.is_terminal:
        out.print("starting the server")
    columns = (
        SpinnerColumn(),
        TextColumn("starting the server"),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
        task = progress.add_task("", total=None)
        return server.wait_ready(READY_SECONDS, lambda line: progress.update(task, description=line[:60]))


async def _run(
    addresses: Addresses, prompts: dict[str, list[str]], max_new_tokens: int, token: str | None, out: Console
) -> tuple[Burst, Model]:
    """Send the burst while a display counts each request's tokens."""
    async with AsyncClient(addresses.grpc, token=token, timeout=CALL_SECONDS) as client:
        model = await client.model()
        adapters = [adapter async for adapter in client.adapters.list()]
        if failed := [adapter for adapter in adapters if adapter.state is not AdapterState.READY]:
            problems = "; ".join((failed[0].name, failed[0].state, *failed[0].problems))
            raise ServerFailed(f"{len(failed)} of {len(adapters)} adapters can't be served: {problems}")
        asks = plan(adapters, prompts)
        base = f"{model.model} ({model.parameters / 1e6:.0f}M parameters, {model.dtype})"
        out.print(
            f"{base} with {len(adapters)} adapters: {len(asks)} requests at once, "
            f"{sum(ask.stream for ask in asks)} of them streaming",
            highlight=False,
            markup=False,
        )
        with TokenDisplay(asks, max_new_tokens, out) as display:
            burst = await send(
                client,
                asks,
                max_new_tokens=max_new_tokens,
                chats=await with_template(client, adapters),
                on_tokens=display.on_tokens,
            )
    return burst, model


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that the server never outlives the demo."""

    def unwind(signum: int, frame: object) -> Never:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
