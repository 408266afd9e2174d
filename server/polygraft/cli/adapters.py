"""`polygraft adapters`: the registry of a running server, and a check that needs none."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polygraft.cli import tables
from polygraft.cli.environment import require_temporary_folder
from polygraft.cli.options import DEFAULT_SERVER, AsJson, Server, Token, console, to_json
from polygraft.cli.serve import settle
from polygraft_client import Adapter, Client

app = typer.Typer(help="Show, load, unload, merge and check adapters.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The adapter's name.")]


@app.command("list")
def list_adapters(server: Server = DEFAULT_SERVER, token: Token = None, as_json: AsJson = False) -> None:
    """List the adapters of a server, those that failed to load included."""
    with Client(server, token=token) as client:
        found = list(client.adapters.list())
    if as_json:
        print(to_json(found))
    else:
        console().print(tables.adapters(found))


@app.command()
def show(
    name: Name,
    nearest: Annotated[
        int,
        typer.Option(min=0, max=16, help="For a soft prompt: nearest tokens to show of each virtual token."),
    ] = 3,
    server: Server = DEFAULT_SERVER,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Show one adapter; of a soft prompt also what its virtual tokens are near to."""
    with Client(server, token=token) as client:
        _print(client.adapters.get(name, nearest_tokens=nearest), as_json)


@app.command()
def load(
    name: Name,
    source: Annotated[
        str, typer.Argument(help="Folder, relative to the server's store. [default: the name]")
    ] = "",
    server: Server = DEFAULT_SERVER,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Load a folder of the server's store."""
    with Client(server, token=token) as client:
        _print(client.adapters.load(name, source), as_json)


@app.command()
def unload(
    name: Name,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait for running requests, or refuse if there are any.")
    ] = True,
    server: Server = DEFAULT_SERVER,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Unload an adapter."""
    with Client(server, token=token) as client:
        gone = client.adapters.unload(name, wait=wait)
    print(to_json(gone) if as_json else f"{gone.name} is unloaded")


@app.command()
def reload(name: Name, server: Server = DEFAULT_SERVER, token: Token = None, as_json: AsJson = False) -> None:
    """Load an adapter's folder again; running requests finish on what they started with."""
    with Client(server, token=token) as client:
        _print(client.adapters.reload(name), as_json)


@app.command()
def merge(
    name: Name,
    keep: Annotated[
        bool,
        typer.Option("--keep/--release", help="Keep the merged copy, or let it go when memory is needed."),
    ] = True,
    server: Server = DEFAULT_SERVER,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Keep a copy of the base with an adapter folded in; returns when it is there."""
    with Client(server, token=token) as client:
        _print(client.adapters.update(name, merged=keep), as_json)


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="The base model: default, a local folder or a hub id. Only its configuration is read."
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="As serve takes it.")] = None,
    adapter_dtype: Annotated[str | None, typer.Option(help="As serve takes it.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="The server's TOML file. Its environment variables count too.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say without a server whether a folder can be served. Exit status: 0 if it fits, 1 if not."""
    given = {"model": model, "dtype": dtype, "adapter_dtype": adapter_dtype, "config": config}
    settings = settle(**{name: value for name, value in given.items() if value is not None})
    require_temporary_folder()
    from polygraft.engine.check import check_folder  # it imports torch

    report = check_folder(folder, settings)
    if as_json:
        print(to_json(report))
    else:
        console().print(tables.check_report(report))
    raise typer.Exit(0 if report.fits else 1)


@app.command()
def convert(
    folder: Annotated[Path, typer.Argument(help="The adapter's folder, whose weights are a pickle.")],
    out: Annotated[Path, typer.Argument(help="The folder to write, which mustn't exist.")],
    max_bytes: Annotated[
        int, typer.Option(min=1, help="Most bytes of the pickle, and of its tensors together.")
    ] = 2**30,
    as_json: AsJson = False,
) -> None:
    """Write a folder with its pickle as safetensors; a process of its own reads that, tensors alone."""
    from polygraft.adapters.convert import convert_folder  # it imports torch

    done = convert_folder(folder, out, max_bytes)
    if as_json:
        print(to_json(done))
    else:
        print(f"{done.folder} holds {done.tensors} tensors in {done.weights}, {done.bytes:,} bytes")


def _print(adapter: Adapter, as_json: bool) -> None:
    if as_json:
        print(to_json(adapter))
        return
    out = console()
    out.print(tables.adapter(adapter))
    if adapter.nearest_tokens:
        out.print(tables.nearest_tokens(adapter))
