"""`polygraft serve`: settings from options, variables and a TOML file; then the server itself."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from polygraft.cli.environment import require_temporary_folder
from polygraft.cli.extras import server_packages
from polygraft.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import ValidationError

    from polygraft.config import ServerConfig


def serve(context: typer.Context) -> None:
    """Serve a base model and its adapters over gRPC. `polygraft serve --help` shows all settings."""
    with server_packages("polygraft serve"):
        config = read_config(context.args)
        require_temporary_folder()
        from polygraft.server import run  # it imports torch, whose seconds a wrong flag shouldn't cost

    raise typer.Exit(run(config))


def read_config(arguments: Sequence[str]) -> ServerConfig:
    """Settle all settings; exits after printing for `--help` and `--print-config`.

    Raises:
        ConfigError: a setting is wrong; lists all of them, each by the flag, variable or key it came from.
        typer.TyperException: an option is unknown or has no value.
    """
    from polygraft.cli.settings import settings_command

    given = settings_command().main(
        args=_without_empty(arguments), prog_name="polygraft serve", standalone_mode=False
    )
    if isinstance(given, int):  # the exit status after --help
        raise typer.Exit(given)
    show = given.pop("print_config", False)
    config = settle(**given)
    config.check()
    if show:
        from polygraft.config_sources import mistaken_variables
        from polygraft.config_text import config_text

        for warning in mistaken_variables(type(config).model_fields, os.environ):
            print("warning:", warning, file=sys.stderr)
        print(config_text(config), end="")
        raise typer.Exit
    return config


def settle(**given: Any) -> ServerConfig:
    """The server's settings for any command, from its arguments, the environment and the file.

    Raises:
        ConfigError: as read_config, except for checks that involve several settings.
    """
    from polygraft.config import ServerConfig
    from polygraft.config_sources import origins

    with _named(given):
        config = ServerConfig(**given)
    config.set_origins(origins(ServerConfig.model_fields, given, os.environ))
    return config


@contextmanager
def _named(given: Mapping[str, Any]) -> Iterator[None]:
    """Turn pydantic's errors into a ConfigError that names where each wrong value came from."""
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    try:
        yield
    except ValidationError as error:
        raise _by_origin(error, given) from None
    except SettingsError as error:
        raise ConfigError("polygraft serve", str(error)) from None


def _without_empty(arguments: Sequence[str]) -> list[str]:
    """Drop flags with an empty value, such as `--adapters "$UNSET"` or `--adapters=$UNSET`."""
    kept: list[str] = []
    for argument in arguments:
        if argument == "" and kept and kept[-1].startswith("--") and "=" not in kept[-1]:
            kept.pop()
        elif not re.fullmatch(r"--[^=]+=", argument):
            kept.append(argument)
    return kept


def _by_origin(error: ValidationError, given: Mapping[str, Any]) -> ConfigError:
    """Name where each wrong value came from; values stay out, one may be a secret."""
    from polygraft.config import ServerConfig
    from polygraft.config_sources import flag, origins

    names = origins(ServerConfig.model_fields, given, os.environ)
    problems = []
    for detail in error.errors(include_url=False, include_input=False):
        setting = str(detail["loc"][0])
        problems.append((names.get(setting, flag(setting)), detail["msg"].removeprefix("Value error, ")))
    (name, problem), *others = problems
    return ConfigError(name, "; ".join([problem, *(f"{name}: {problem}" for name, problem in others)]))
