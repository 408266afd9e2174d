"""The commands, and how every failure of theirs ends: one line on stderr and an exit status."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Protocol, runtime_checkable

import typer

import polygraft_client
from polygraft import __version__
from polygraft.cli import adapters, bench, demo, generate, score, serve
from polygraft.cli.environment import discard_output
from polygraft.cli.help import CONTEXT, PlainCommand, PlainGroup
from polygraft.errors import ConfigError, PolygraftError

_FLAGS = {"address": "--server", "stop_token_ids": "--stop-token-id"}
"""Flags whose names differ from those of the client's arguments."""
_WITHOUT_FLAG = {"prompt", "chat", "continuations"}
"""The client's arguments that are positional on the command line."""

FAILED = 1
MISUSED = 2
"""Exit statuses."""


@runtime_checkable
class UsageError(Protocol):
    """What all of typer's errors offer; the names of their classes differ between versions."""

    exit_code: int

    def format_message(self) -> str:
        """What is wrong with the command line."""


class Commands(PlainGroup):
    """The commands; shows a failure as one line instead of a traceback."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command and exit."""
        extra["standalone_mode"] = False
        try:
            status = super().main(*args, **extra)
            sys.stdout.flush()  # here, where a failure can still be reported
        except BrokenPipeError:
            # The reader, such as `head`, has seen enough. Typer exits likewise when it gets the error first.
            discard_output()
            status = FAILED
        except Exception as error:
            status = exit_status(error)
            if status is None:
                raise
            if line := " ".join(_text(error).split()):  # empty where the help is the answer
                print("error:", line, file=sys.stderr)
        sys.exit(status)


def exit_status(error: Exception) -> int | None:
    """The exit status for an error; None for one that only a fault of the program can explain."""
    match error:
        case ConfigError() | polygraft_client.InvalidRequest():
            return MISUSED
        case UsageError():
            return error.exit_code
        case PolygraftError() | polygraft_client.PolygraftError() | OSError() | typer.Abort():
            return FAILED
    return None


def _text(error: Exception) -> str:
    if isinstance(error, UsageError):
        return error.format_message()
    if isinstance(error, typer.Abort):
        return "aborted"
    if isinstance(error, polygraft_client.Unauthenticated):
        return f"{error.message}; give --token, or set POLYGRAFT_ADMIN_TOKEN"
    if isinstance(error, polygraft_client.InvalidRequest) and error.argument.isidentifier():
        return f"{_flag(error.argument)}: {error.problem}"
    return str(error)


def _flag(argument: str) -> str:
    """Return the flag for an argument of the client."""
    if argument in _WITHOUT_FLAG:
        return argument
    return _FLAGS.get(argument, f"--{argument.replace('_', '-')}")


app = typer.Typer(
    cls=Commands,
    help="Serve one base language model with many adapters, mixed in every step.",
    context_settings=CONTEXT,
    pretty_exceptions_enable=False,
)
app.command(
    cls=PlainCommand,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)(serve.serve)
app.command(cls=PlainCommand)(generate.generate)
app.command(cls=PlainCommand)(score.score)
app.add_typer(adapters.app, name="adapters")
app.add_typer(bench.app, name="bench")
app.command(cls=PlainCommand)(demo.demo)


@app.command(cls=PlainCommand)
def version() -> None:
    """Print the version."""
    print(__version__)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Only carries the options that need no command."""
