"""`polygraft adapters`: the registry of a running server, and a check that needs none."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polygraft.cli import tables
from polygraft.cli.environment import require_temporary_folder
from polygraft.cli.extras import server_packages
from polygraft.cli.help import CONTEXT, PlainCommand, PlainGroup
from polygraft.cli.options import DEFAULT_SERVER, AsJson, Server, Token, console, to_json
from polygraft.cli.serve import settle
from polygraft_client import Adapter, Client

app = typer.Typer(
    cls=PlainGroup,
    help="Show, load, unload, merge, check and convert adapters.",
    context_settings=CONTEXT,
)

Name = Annotated[str, typer.Argument(help="The adapter's name.")]


@app.command("list", cls=PlainCommand)
def list_adapters(server: Server = DEFAULT_SERVER, token: Token = None, as_json: AsJson = False) -> None:
    """List a server's adapters, with those that failed to load and why."""
    with Client(server, token=token) as client:
        found = list(client.adapters.list())
    if as_json:
        print(to_json(found))
    else:
        console().print(tables.adapters(found))


@app.command(cls=PlainCommand)
def show(
    name: Name,
    nearest: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, max=16, help="Nearest tokens to show for each virtual token of a soft prompt."
        ),
    ] = 3,
    server: Server = DEFAULT_SERVER,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Show one adapter, and the nearest tokens to each virtual token of a soft prompt."""
    with Client(server, token=token) as client:
        _print(client.adapters.get(name, nearest_tokens=nearest), as_json)


@app.command(cls=PlainCommand)
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


@app.command(cls=PlainCommand)
def unload(
    name: Name,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait/--no-wait", help="Wait until its running requests end, or fail if there are any."
        ),
    ] = True,
    server: Server = DEFAULT_SERVER,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Unload an adapter."""
    with Client(server, token=token) as client:
        gone = client.adapters.unload(name, wait=wait)
    print(to_json(gone) if as_json else f"{gone.name} is unloaded")


@app.command(cls=PlainCommand)
def reload(name: Name, server: Server = DEFAULT_SERVER, token: Token = None, as_json: AsJson = False) -> None:
    """Load an adapter's folder again. Running requests finish with the version they started with."""
    with Client(server, token=token) as client:
        _print(client.adapters.reload(name), as_json)


@app.command(cls=PlainCommand)
def merge(
    name: Name,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep/--release", help="Keep the merged copy, or allow its eviction when memory is needed."
        ),
    ] = True,
    server: Server = DEFAULT_SERVER,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Make a merged copy of the base's weights for an adapter, and keep it. Returns when it is ready."""
    with Client(server, token=token) as client:
        _print(client.adapters.update(name, merged=keep), as_json)


@app.command(cls=PlainCommand)
def check(
    folder: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Base model: `default`, a local folder or a hub id. Only its configuration is read.",
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(metavar="TYPE", help="As in `polygraft serve`.")] = None,
    adapter_dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="As in `polygraft serve`.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The server's TOML file. The server's environment variables apply too."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check without a server whether a folder can be served. The exit status is 0 if it can, 1 if not."""
    given = {"model": model, "dtype": dtype, "adapter_dtype": adapter_dtype, "config": config}
    with server_packages("polygraft adapters check"):
        settings = settle(**{name: value for name, value in given.items() if value is not None})
        require_temporary_folder()
        from polygraft.engine.check import check_folder  # it imports torch

    report = check_folder(folder, settings)
    if as_json:
        print(to_json(report))
    else:
        console().print(tables.check_report(report))
    raise typer.Exit(0 if report.fits else 1)


@app.command(cls=PlainCommand)
def convert(
    folder: Annotated[Path, typer.Argument(help="The adapter's folder, whose weights are a pickle.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist yet.")],
    max_bytes: Annotated[
        int,
        typer.Option(metavar="BYTES", min=1, help="Largest size of the pickle, and of its tensors together."),
    ] = 2**30,
    as_json: AsJson = False,
) -> None:
    """Convert a folder's pickle to safetensors.

    A process of its own reads the pickle, and only tensors from it.
    """
    with server_packages("polygraft adapters convert"):
        from polygraft.adapters.files.convert import convert_folder  # it imports torch

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
