"""Repairs the process's environment before a command runs: streams, encodings, empty variables.

Imports only modules that the interpreter has loaded anyway.
"""

from __future__ import annotations

import io
import os
import sys

_EMPTY_IS_UNSET = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "HF_HOME", "TMPDIR", "CXX")


def prepare() -> None:
    """Call once, before anything else is imported."""
    _open_standard_streams()
    _print_whatever_it_is()
    _drop_empty_variables()


def discard_output() -> None:
    """Send what is still buffered for standard output to the null device: nobody reads it any more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def require_temporary_folder() -> None:
    """Raise ConfigError unless there is a folder for temporary files: torch can't be imported without one."""
    import tempfile

    from polygraft.errors import ConfigError

    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        raise ConfigError(
            "TMPDIR", "no folder for temporary files can be written; set it to one, or mount a tmpfs at /tmp"
        ) from None


def _open_standard_streams() -> None:
    """Open closed ones on the null device: otherwise the first socket gets their number, and the log."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115


def _print_whatever_it_is() -> None:
    """Escape characters that the console's encoding lacks, such as emoji, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_empty_variables() -> None:
    """Unset empty variables, for libraries too: an empty HOME would make / the home."""
    for name in [*os.environ]:
        if os.environ[name] == "" and (name in _EMPTY_IS_UNSET or name.startswith("POLYGRAFT_")):
            del os.environ[name]
