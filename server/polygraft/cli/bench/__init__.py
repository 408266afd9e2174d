"""`polygraft bench`: load on a running server, and what came of it."""

import typer

from polygraft.cli.bench.command import bench
from polygraft.cli.bench.compare import compare
from polygraft.cli.help import CONTEXT, PlainCommand, PlainGroup

app = typer.Typer(cls=PlainGroup, invoke_without_command=True, context_settings=CONTEXT)
app.callback()(bench)
app.command(cls=PlainCommand)(compare)
