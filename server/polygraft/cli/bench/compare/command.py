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
from polygraft.cli.bench.compare.result import Comparison
from polygraft.cli.bench.compare.verdict import caveats, crossovers, headline
from polygraft.cli.demo.launcher import Addresses, ServerProcess, serve_command
from polygraft.cli.extras import require_server
from polygraft.cli.options import AsJson, Token, console, to_json
from polygraft.errors import ConfigError
from polygraft_client import AsyncClient

READY_SECONDS = 600.0
PATHS = ",".join(Path)
AS_SERVE = "As in `polygraft serve`, for the server that the command starts."


def compare(
    server: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="A running server. [default: the command starts one]"),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT", help="Metrics endpoint of a running server, for steps, switches and memory."
        ),
    ] = "",
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="Base model of the server that the command starts.")
    ] = "default",
    adapters: Annotated[File, typer.Option(metavar="FOLDER", help="Folder of its adapters.")] = File(
        "adapters"
    ),
    dtype: Annotated[str, typer.Option(metavar="TYPE", help=AS_SERVE)] = "auto",
    quantization: Annotated[str, typer.Option(metavar="TYPE", help=AS_SERVE)] = "none",
    requantize_merged: Annotated[bool, typer.Option("--requantize-merged", help=AS_SERVE)] = False,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help=AS_SERVE)] = None,
    concurrency: Annotated[
        str, typer.Option(metavar="N,N,…", help="Numbers of requests in flight to measure.")
    ] = ("1,2,4,8,16,32"),
    mix: Annotated[
        str,
        typer.Option(
            metavar="N,N,…",
            help="Numbers of distinct adapters to measure; `zipf` is up to 32 of them, by Zipf's law.",
        ),
    ] = ("1,2,4,8,zipf"),
    paths: Annotated[str, typer.Option(metavar="PATH,…", help="Paths to compare.")] = PATHS,
    rounds: Annotated[
        int, typer.Option(metavar="N", min=1, help="Rounds; in each of them all paths take turns.")
    ] = 3,
    pairs: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Rounds with a single request in flight; 0 leaves them out."),
    ] = 20,
    changing_load: Annotated[
        bool,
        typer.Option(
            "--changing-load/--steady",
            help="Measure each path while the load changes from one adapter to eight and back.",
        ),
    ] = True,
    prompt_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Random tokens in each prompt.")
    ] = 64,
    new_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens in each answer, exactly.")] = 64,
    out: Annotated[
        File | None,
        typer.Option(metavar="FOLDER", help="Write compare.json and compare.html, with plots, here."),
    ] = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Compare merged and unmerged LoRA on one server, and show where each is faster."""
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
    for line in (headline(found), *caveats(found), *table.conclusions(found)):
        shown.print(line, highlight=False, markup=False)


@contextlib.contextmanager
def _server(running: str | None, metrics: str, flags: list[str], screen: Console) -> Iterator[Addresses]:
    """A server of someone else's, or one of our own that ends with the comparison."""
    if running is not None:
        yield Addresses(running, metrics)
        return
    require_server("polygraft bench compare without --server")
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
