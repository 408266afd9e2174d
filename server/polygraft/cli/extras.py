"""Reports packages that a command needs beyond those of the extra `cli`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from polygraft.errors import PolygraftError

_OWN = {"polygraft", "polygraft_api", "polygraft_client"}


class MissingPackages(PolygraftError):
    """A command needs the server's packages, and only the command line's are installed.

    Args:
        command: as it is typed, such as `polygraft serve`.
        missing: a module that isn't installed.
    """

    reason = "PACKAGES_MISSING"

    def __init__(self, command: str, missing: str) -> None:
        super().__init__(
            f'{command} needs the server\'s packages: pip install "polygraft[server]" '
            f"({missing} isn't installed)"
        )
        self.command = command
        self.missing = missing


@contextmanager
def server_packages(command: str) -> Iterator[None]:
    """Report a missing package of the server, for imports in the block.

    Raises:
        MissingPackages: one of them isn't installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in _OWN:  # a fault of ours
            raise
        raise MissingPackages(command, error.name or str(error)) from error


def require_server(command: str) -> None:
    """Raise MissingPackages unless this machine can run a server, for a command that starts one."""
    for module in ("pydantic_settings", "torch", "transformers"):
        if importlib.util.find_spec(module) is None:
            raise MissingPackages(command, module)
