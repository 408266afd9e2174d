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
    adapter_refs,
    print_logprobs,
    to_json,
)
from polygraft_client import Client


def score(
    prompt: Annotated[str, typer.Argument(help="What is conditioned on; may be empty.")],
    continuations: Annotated[list[str], typer.Argument(metavar="CONTINUATION...", help="What to score.")],
    adapter: AdapterNames = None,
    combination_type: Combination = None,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="The prompt as a user's message, or as bare text.")
    ] = False,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Print each token's log-probability as well.")
    ] = False,
    top_logprobs: Annotated[
        int, typer.Option(help="The same with so many of the likeliest tokens; at most 20.")
    ] = 0,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which the call fails.")] = None,
    server: Server = DEFAULT_SERVER,
    as_json: AsJson = False,
) -> None:
    """Print each continuation's log-likelihood; * marks what greedy decoding would have produced."""
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
