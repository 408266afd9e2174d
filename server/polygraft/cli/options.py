"""Options that several commands share, and how values look on a terminal."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from polygraft.cli.help import COMMON
from polygraft_client import AdapterRef, CombinationType, TokenLogprob

PIPED_WIDTH = 160  # columns of a table that isn't shown on a terminal

DEFAULT_SERVER = "127.0.0.1:50051"
ADAPTERS = "Adapters"
"""The heading of the options that choose adapters."""

Server = Annotated[
    str,
    typer.Option(
        "--server",
        metavar="HOST:PORT",
        envvar="POLYGRAFT_SERVER",
        help="The server to call.",
        rich_help_panel=COMMON,
        callback=lambda given: given or DEFAULT_SERVER,
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token",
        envvar="POLYGRAFT_ADMIN_TOKEN",
        metavar="TOKEN",
        help="The server's admin token, if it has one. Prefer the variable: other users can read options.",
        rich_help_panel=COMMON,
        callback=lambda given: given or None,
    ),
]
AdapterNames = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME[:WEIGHT]",
        help="Adapter to use; repeatable, in the order in which they act. [default: the base model alone]",
        rich_help_panel=ADAPTERS,
    ),
]
Combination = Annotated[
    CombinationType | None,
    typer.Option(
        "--combination-type",
        metavar="[stack|linear]",
        case_sensitive=False,
        help="How several adapters act together: one after another (`stack`), or as the single LoRA that "
        "PEFT's linear combination makes of them (`linear`). [default: stack]",
        rich_help_panel=ADAPTERS,
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS", help="Fail if the call takes longer. [default: no limit]", rich_help_panel=COMMON
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=COMMON)]


OfferedPath = Literal["auto", "unmerged", "merged"]
"""The LoRA paths that a request may ask for."""
PATHS = "[auto|unmerged|merged]"


def adapter_refs(given: Sequence[str] | None) -> tuple[str | None, tuple[AdapterRef, ...]]:
    """A single adapter's name, or else several adapters or one with a weight; raises BadParameter."""
    refs = []
    for text in given or ():
        name, separator, weight = text.partition(":")
        try:
            refs.append(AdapterRef(name, float(weight) if separator else 1.0))
        except ValueError:
            raise typer.BadParameter(
                f"expected NAME[:WEIGHT], got {text!r}", param_hint="--adapter"
            ) from None
    if len(refs) == 1 and refs[0].weight == 1.0:
        return refs[0].name, ()
    return None, tuple(refs)


def console() -> Console:
    """Standard output; wide where it isn't a terminal, so that tables aren't cut."""
    out = Console()
    return out if out.is_terminal else Console(width=PIPED_WIDTH)


def to_json(value: Any, *, indent: int | None = 2) -> str:
    """A dataclass, or a list of them, as JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, datetime):
            return value.isoformat()
        return dataclasses.asdict(value)

    # Where the console lacks characters, JSON's own escapes: Python's would break the JSON.
    shows_all = (sys.stdout.encoding or "").lower().startswith("utf")
    return json.dumps(value, default=plain, ensure_ascii=not shows_all, indent=indent)


def print_logprobs(tokens: Sequence[TokenLogprob]) -> None:
    """A line for each token: its log-probability, itself, and the likeliest at its position, if any."""
    for token in tokens:
        own = "" if token.logprob is None else f"{token.logprob:.4f}"
        top = "".join(f"\t{near.text!r} {near.logprob:.4f}" for near in token.top)
        print(f"{own:>10}  {token.text!r}{top}")
