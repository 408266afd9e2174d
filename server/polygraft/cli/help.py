"""Help as plain text: options by topic, names never cut, brackets as they are written."""

from __future__ import annotations

import sys
from typing import Any

from typer.core import TyperCommand, TyperGroup

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
"""Settings of every command's context."""

ARGUMENTS, OPTIONS = "Arguments", "Options"
COMMON = "Server and output"
"""The heading of options that many commands share."""
_UNCUT = 1000
"""More characters than any command's first sentence has."""


class PlainCommand(TyperCommand):
    """A command whose help lists its options under their topics (`rich_help_panel`)."""

    def __init__(self, *args: Any, **extra: Any) -> None:
        super().__init__(*args, **extra)
        self.rich_markup_mode = None

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """`[OPTIONS]`, then the arguments; optional ones in brackets."""
        arguments = (param for param in self.get_params(ctx) if param.param_type_name == "argument")
        pieces = ((_shown(param), param.required) for param in arguments)
        return ["[OPTIONS]", *(shown if required else f"[{shown}]" for shown, required in pieces)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then each topic's options; those that many commands share come last."""
        write_options(self, ctx, formatter)


class PlainGroup(TyperGroup):
    """A group of commands with the same help, which is also the answer to no command at all."""

    def __init__(self, *args: Any, **extra: Any) -> None:
        super().__init__(*args, **extra)
        self.rich_markup_mode = None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; without any, print the help and exit as after misuse."""
        if not args and not self.invoke_without_command and not ctx.resilient_parsing:
            print(ctx.get_help(), file=sys.stderr)
            ctx.exit(2)
        rest: list[str] = super().parse_args(ctx, args)
        return rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options as `PlainCommand` does, then the commands."""
        write_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands with their first sentences, wrapped where the base class would cut them."""
        names = self.list_commands(ctx)
        found = [(name, command) for name in names if (command := self.get_command(ctx, name)) is not None]
        rows = [(name, command.get_short_help_str(_UNCUT)) for name, command in found if not command.hidden]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


def write_options(command: Any, ctx: Any, formatter: Any) -> None:
    """Write a command's arguments and options under their headings."""
    topics: dict[str, list[tuple[str, str]]] = {}
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx)
        if record is None:
            continue
        if param.param_type_name == "argument":
            topics.setdefault(ARGUMENTS, []).append((_shown(param), record[1]))
        else:
            topics.setdefault(getattr(param, "rich_help_panel", None) or OPTIONS, []).append(record)
    last = [topic for topic in (OPTIONS, COMMON) if topic in topics]
    first = [topic for topic in topics if topic not in last]
    for topic in [*first, *last]:
        with formatter.section(topic):
            formatter.write_dl(topics[topic])


def _shown(argument: Any) -> str:
    """An argument as the usage line shows it, such as NAME."""
    return str(argument.metavar or argument.name.upper())
