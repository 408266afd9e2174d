"""The command line, `polygraft`."""

import sys


def main() -> None:
    """Run the command that the process's arguments name, and exit."""
    try:
        from polygraft.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich"}:
            raise
        # the plain install is the client alone
        sys.exit(f'error: the command line needs more packages: pip install "polygraft[server]" ({error})')
    app(prog_name="polygraft")
