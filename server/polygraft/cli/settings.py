"""The settings as options of `polygraft serve`."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Annotated, Any, Literal

import typer
from pydantic.fields import FieldInfo

from polygraft.cli.help import CONTEXT, PlainCommand
from polygraft.config import ServerConfig
from polygraft.config_sources import flag, variable
from polygraft.config_text import default_text, extra

ABOUT = """Serve a base model and its adapters over gRPC.

Every setting is an option, an environment variable, and a key of the TOML file that --config names.
Options beat variables, and variables beat the file; --print-config shows what results. Sizes take units,
such as 256MiB or 1.5GB.
"""


def settings_command() -> Any:
    """A command that returns the options it was given, by setting."""

    def collect(**given: Any) -> dict[str, Any]:
        return {name: value for name, value in given.items() if value is not None}

    parameters = [_parameter(name, field) for name, field in ServerConfig.model_fields.items()]
    show = Annotated[
        bool,
        typer.Option("--print-config", help="Print the settings as a TOML file, and exit."),
    ]
    parameters.append(inspect.Parameter("print_config", _KEYWORD, default=False, annotation=show))
    collect.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # typer reads it
    collect.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(cls=PlainCommand, help=ABOUT, context_settings=CONTEXT)(collect)
    return typer.main.get_command(app)


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """An option that takes text, which the configuration reads; or a pair of switches."""
    kind = _kind(field)
    more = f"[env var: {variable(name)}; default: {default_text(field)}]"
    about = f"{field.description} {more}"
    names = [flag(name) + f"/--no-{name.replace('_', '-')}"] if kind is bool else [flag(name)]
    option = typer.Option(
        *names, help=about, metavar=_metavar(field, kind), show_default=False,
        rich_help_panel=str(extra(field)["group"]),
    )  # fmt: skip
    value: Any = bool if kind is bool else str
    return inspect.Parameter(name, _KEYWORD, default=None, annotation=Annotated[value | None, option])


def _kind(field: FieldInfo) -> Any:
    """The setting's type without None."""
    if typing.get_origin(field.annotation) in (types.UnionType, typing.Union):
        (kind,) = (part for part in typing.get_args(field.annotation) if part is not type(None))
        return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
    return field.annotation


def _metavar(field: FieldInfo, kind: Any) -> str | None:
    if given := extra(field)["metavar"]:
        return str(given)
    if typing.get_origin(kind) is Literal:
        return f"[{'|'.join(typing.get_args(kind))}]"
    if kind is bool:
        return None
    assert kind is int, f"{field} needs a metavar"
    return "N"
