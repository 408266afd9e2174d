"""`polygraft serve`: settings from flags, variables and a TOML file; then the server itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from polygraft.cli.environment import require_temporary_folder
from polygraft.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import ValidationError

    from polygraft.config import ServerConfig


def serve(context: typer.Context) -> None:
    """Serve a base model and its adapters over gRPC. `polygraft serve --help` shows all settings."""
    config = read_config(context.args)
    require_temporary_folder()
    from polygraft.server import run  # it imports torch, which takes seconds that a wrong flag shouldn't cost

    raise typer.Exit(run(config))


def read_config(arguments: Sequence[str]) -> ServerConfig:
    """Settle all settings; exits after printing them for `--help`.

    Raises:
        ConfigError: anything is wrong with them; lists everything, each by its flag.
    """
    from pydantic_settings import CliApp

    from polygraft.config import ServerConfig

    with _named_by_flag():
        config = CliApp.run(ServerConfig, cli_args=_without_empty(arguments), cli_exit_on_error=False)
    config.check()
    return config


def settle(**given: Any) -> ServerConfig:
    """The server's settings for a command that doesn't serve, from arguments, environment and file.

    Raises:
        ConfigError: as read_config, except for checks that involve several settings.
    """
    from polygraft.config import ServerConfig

    with _named_by_flag():
        return ServerConfig(**given)


@contextmanager
def _named_by_flag() -> Iterator[None]:
    """Turn pydantic's errors into ConfigError with the flag's name."""
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    try:
        yield
    except ValidationError as error:
        raise _by_flag(error) from None
    except SettingsError as error:
        raise _by_argument(str(error)) from None


def _without_empty(arguments: Sequence[str]) -> list[str]:
    """Drop flags with an empty value, such as `--adapters "$UNSET"` or `--adapters=$UNSET`."""
    kept: list[str] = []
    for argument in arguments:
        if argument == "" and kept and kept[-1].startswith("--") and "=" not in kept[-1]:
            kept.pop()
        elif not re.fullmatch(r"--[^=]+=", argument):
            kept.append(argument)
    return kept


def _by_flag(error: ValidationError) -> ConfigError:
    """Name each wrong setting as the command line spells it; values stay out, one may be a secret."""
    problems = []
    for detail in error.errors(include_url=False, include_input=False):
        flag = "--" + ".".join(map(str, detail["loc"])).replace("_", "-")
        problems.append((flag, detail["msg"].removeprefix("Value error, ")))
    (flag, problem), *others = problems
    return ConfigError(flag, "; ".join([problem, *(f"{flag}: {problem}" for flag, problem in others)]))


def _by_argument(text: str) -> ConfigError:
    """Name the argument that can't be read at all."""
    text = text.removeprefix("error parsing CLI: ")
    if found := re.fullmatch(r"argument (?P<flag>--\S+): (?P<problem>.*)", text, re.DOTALL):
        return ConfigError(found["flag"], found["problem"])
    return ConfigError("polygraft serve", text)
