"""The command line, `polygraft`."""

import sys


def main() -> None:
    """Run the command that the process's arguments name, and exit."""
    if sys.argv[1:2] == ["serve"]:
        # First of all: process 1 of a container loses signals that it has no handler for.
        from polygraft.early_signals import end_early

        end_early()
    from polygraft.cli.environment import prepare

    prepare()
    try:
        from polygraft.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich", "prometheus_client"}:
            raise
        # The plain install is the client alone.
        sys.exit(
            'error: the command line needs more packages: pip install "polygraft[cli]" to call a server, '
            f'"polygraft[server]" to run one ({error})'
        )
    app(prog_name="polygraft")
