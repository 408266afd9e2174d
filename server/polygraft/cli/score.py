"""`polygraft score`: how likely a running server's model finds given continuations."""

from __future__ import annotations

from typing import Annotated

import typer

from polygraft.cli.options import (
    DEFAULT_SERVER,
    AdapterNames,
    AsJson,
    Combination,
    Server,
    Timeout,
    adapter_refs,
    print_logprobs,
    to_json,
)
from polygraft_client import Client


def score(
    prompt: Annotated[str, typer.Argument(help="The text before the continuations; may be empty.")],
    continuations: Annotated[
        list[str], typer.Argument(metavar="CONTINUATION...", help="The texts to score.")
    ],
    adapter: AdapterNames = None,
    combination_type: Combination = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat/--raw",
            help="Send the prompt as a user's message through the chat template, or as plain text.",
        ),
    ] = False,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Print each token's log-probability.")] = False,
    top_logprobs: Annotated[
        int,
        typer.Option(
            metavar="N",
            show_default=False,
            help="Print each position's N likeliest tokens as well, at most 20.",
        ),
    ] = 0,
    timeout: Timeout = None,
    server: Server = DEFAULT_SERVER,
    as_json: AsJson = False,
) -> None:
    """Print each continuation's log-likelihood after a prompt; * marks what greedy decoding would produce."""
    single, several = adapter_refs(adapter)
    with Client(server, timeout=timeout) as client:
        answer = client.score(
            None if chat else prompt,
            continuations,
            chat=[{"role": "user", "content": prompt}] if chat else None,
            adapter=single,
            adapters=several,
            combination_type=combination_type,
            top_logprobs=top_logprobs,
        )
    if as_json:
        print(to_json(answer))
        return
    for continuation, scored in zip(continuations, answer.continuations, strict=True):
        print(f"{scored.log_likelihood:>12.4f} {'*' if scored.is_greedy else ' '} {continuation!r}")
        if logprobs or top_logprobs:
            print_logprobs(scored.tokens)
