"""`polygraft bench`: load on a running server, and what came of it."""

import typer

from polygraft.cli.bench.command import bench
from polygraft.cli.bench.compare import compare

app = typer.Typer(invoke_without_command=True)
app.callback()(bench)
app.command()(compare)
