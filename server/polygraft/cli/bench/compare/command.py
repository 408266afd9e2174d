"""The comparison from start to end."""

from __future__ import annotations

import asyncio
import contextlib
import platform
from collections.abc import Callable, Iterator
from pathlib import Path as File
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from polygraft.cli.bench.compare import scraped, table
from polygraft.cli.bench.compare.cells import Cell, Path, comparable, mixes
from polygraft.cli.bench.compare.measure import Runner, Settings, work
from polygraft.cli.bench.compare.result import Comparison, crossovers
from polygraft.cli.demo.launcher import Addresses, ServerProcess, serve_command
from polygraft.cli.options import AsJson, Token, console, to_json
from polygraft.errors import ConfigError
from polygraft_client import AsyncClient

READY_SECONDS = 600.0
PATHS = ",".join(Path)


def compare(
    server: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="A running server. [default: one is started for the comparison]"
        ),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", help="Of a running server, for steps, switches and memory."),
    ] = "",
    model: Annotated[str, typer.Option(help="Of the server that is started.")] = "default",
    adapters: Annotated[File, typer.Option(help="Its store of adapters.")] = File("adapters"),
    dtype: Annotated[str, typer.Option(help="As serve takes it.")] = "auto",
    quantization: Annotated[str, typer.Option(help="As serve takes it.")] = "none",
    requantize_merged: Annotated[
        bool, typer.Option("--requantize-merged", help="As serve takes it.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="As serve takes it.")] = None,
    concurrency: Annotated[str, typer.Option(help="Requests at a time, one number for each run.")] = (
        "1,2,4,8,16,32"
    ),
    mix: Annotated[str, typer.Option(help="Numbers of distinct adapters; zipf is Zipf over up to 32.")] = (
        "1,2,4,8,zipf"
    ),
    paths: Annotated[str, typer.Option(help="Paths to compare.")] = PATHS,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which all paths take their turn.")] = 3,
    pairs: Annotated[
        int, typer.Option(min=0, help="Rounds of one request at a time; 0 leaves that out.")
    ] = 20,
    changing_load: Annotated[
        bool,
        typer.Option("--changing-load/--steady", help="One hot adapter, eight alike, one hot, on each path."),
    ] = True,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt, random ones.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer, exactly.")] = 64,
    out: Annotated[
        File | None, typer.Option(help="Folder for compare.json and compare.html, with plots.")
    ] = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Compare the merged and the unmerged path of LoRA on one server, and show where each wins."""
    chosen = _chosen(paths)
    sizes, zipf = _sizes(mix)
    concurrencies = _numbers("--concurrency", concurrency)
    render = None if out is None else _renderer()
    flags = ["--model", model, "--adapters", str(adapters), "--dtype", dtype, "--quantization", quantization]
    flags += ["--requantize-merged"] if requantize_merged else []
    flags += ["--threads", str(threads)] if threads else []
    screen = Console(stderr=True)

    async def run(addresses: Addresses) -> Comparison:
        async with AsyncClient(addresses.grpc, token=token) as client:
            served = await client.model()
            listed = [adapter async for adapter in client.adapters.list()]
            names = comparable(listed)
            if not names:
                raise ConfigError("--adapters", "no adapter is ready that can be merged")
            found = Comparison(
                served.model, served.dtype, served.quantization, served.server_version,
                f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
                prompt_tokens, new_tokens, rounds,
            )  # fmt: skip
            cells = [Cell(m, c) for m in mixes(names, sizes, zipf=zipf) for c in concurrencies]
            changes = changing_load and len(names) > 1
            total = sum(work(cell.concurrency) for cell in cells) * len(chosen) * rounds + 2 * work(1)
            total += pairs * len(chosen) * work(1) + (9 * 4 * work(16) if changes else 0)
            with _progress(screen, hidden=as_json) as progress:
                bar = progress.add_task("comparing", total=total)
                settings = Settings(prompt_tokens, new_tokens, rounds, served.vocabulary_size)
                runner = Runner(
                    client, addresses.metrics, settings, lambda amount: progress.advance(bar, amount)
                )
                if pairs and Path.BASE in chosen:
                    found.pairs = await runner.pairs(names[0], chosen, pairs)
                found.cells = await runner.cells(cells, chosen)
                if len(names) > 1 and Path.MERGED in chosen:
                    found.switch_ms = await runner.switch_ms(names)
                found.sizes = await runner.sizes(listed, rounds)
                if changes:
                    found.phases = await runner.changing_load(names, 16)
                if Path.MERGED in chosen:
                    found.copies = await runner.copies(names[:8])
                found.crossover = crossovers(found.cells)
                counts = scraped.read(addresses.metrics)
                found.resident_bytes = counts.resident_bytes if counts else None
                return found

    with _server(server, metrics, flags, screen) as addresses:
        found = asyncio.run(run(addresses))
    _show(found, as_json)
    if out is not None and render is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "compare.json").write_text(to_json(found))
        (out / "compare.html").write_text(render(found), encoding="utf-8")
        screen.print(f"written: {out / 'compare.json'}, {out / 'compare.html'}", highlight=False)


def _renderer() -> Callable[[Comparison], str]:
    """What makes the report; asked for before anything is measured."""
    try:
        from polygraft.cli.bench.compare.html import html  # matplotlib takes a second
    except ImportError as error:
        raise ConfigError("--out", f"{error}; the plots need it: pip install 'polygraft[bench]'") from error
    return html


def _show(found: Comparison, as_json: bool) -> None:
    if as_json:
        print(to_json(found))
        return
    shown = console()
    for one in table.tables(found):
        shown.print(one)
    for line in table.conclusions(found):
        shown.print(line, highlight=False)


@contextlib.contextmanager
def _server(running: str | None, metrics: str, flags: list[str], screen: Console) -> Iterator[Addresses]:
    """A server of someone else's, or one of our own that ends with the comparison."""
    if running is not None:
        yield Addresses(running, metrics)
        return
    with ServerProcess(serve_command(*flags)) as process:
        with screen.status("starting the server"):
            addresses = process.wait_ready(READY_SECONDS, report=lambda line: None)
        yield addresses
        process.stop()


def _progress(screen: Console, *, hidden: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=screen,
        disable=hidden,
    )


def _chosen(paths: str) -> list[Path]:
    try:
        return [Path(name) for name in dict.fromkeys(paths.split(","))]
    except ValueError:
        raise ConfigError("--paths", f"expected some of {PATHS}, got {paths!r}") from None


def _sizes(mix: str) -> tuple[list[int], bool]:
    names = mix.split(",")
    return _numbers("--mix", ",".join(name for name in names if name != "zipf")), "zipf" in names


def _numbers(flag: str, text: str) -> list[int]:
    try:
        numbers = sorted({int(number) for number in text.split(",")} if text else ())
    except ValueError:
        raise ConfigError(flag, f"expected whole numbers with commas between them, got {text!r}") from None
    if any(number < 1 for number in numbers):
        raise ConfigError(flag, f"must be at least 1, got {text!r}")
    return numbers
