"""`polygraft generate`: one answer from a running server."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from polygraft.cli.options import (
    ADAPTERS,
    DEFAULT_SERVER,
    PATHS,
    AdapterNames,
    AsJson,
    Combination,
    OfferedPath,
    Server,
    Timeout,
    adapter_refs,
    print_logprobs,
    to_json,
)
from polygraft_client import Client, GenerateOptions, Generation, Stream

STANDARD_INPUT = "-"

SAMPLING, LENGTH = "Sampling", "Length of the answer"
OF_THE_MODEL = "[default: the model's]"


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; `-` reads it from standard input.")],
    adapter: AdapterNames = None,
    combination_type: Combination = None,
    lora_path: Annotated[
        OfferedPath | None,
        typer.Option(
            metavar=PATHS,
            case_sensitive=False,
            help="How LoRA runs: `unmerged` computes a side path, `merged` runs on a "
            "copy of the weights with the "
            "adapter folded in, `auto` leaves it to the server. [default: the server's]",
            rich_help_panel=ADAPTERS,
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Send the prompt as a user's message through the chat template, or as plain text. [default: "
            "--chat if the model or the adapter has a template]",
        ),
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Print tokens as they are generated. [default: --stream on a terminal]",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Most tokens to generate. [default: 256]", rich_help_panel=LENGTH),
    ] = None,
    min_new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Fewest tokens to generate. [default: 0]", rich_help_panel=LENGTH),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help=f"Randomness of the sampling, 0 to 100; 0 is greedy decoding. {OF_THE_MODEL}",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help=f"Sample from the likeliest tokens whose probabilities add up to X. {OF_THE_MODEL}",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help=f"Sample from the K likeliest tokens; 0 keeps all. {OF_THE_MODEL}",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help=f"Drop tokens less likely than X times the likeliest. {OF_THE_MODEL}",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Seed of the sampling. [default: random]", rich_help_panel=SAMPLING),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help=f"Values above 1 penalise tokens that already occurred. {OF_THE_MODEL}",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    presence_penalty: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Subtract X from the logits of tokens in the answer; -2 to 2.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    frequency_penalty: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Subtract X for each occurrence of a token in the answer; -2 to 2.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID=VALUE", help="Add to a token's logit; repeatable.", rich_help_panel=SAMPLING
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="End the answer before this text; repeatable.", rich_help_panel=LENGTH
        ),
    ] = None,
    stop_token_id: Annotated[
        list[int] | None,
        typer.Option(metavar="ID", help="End the answer at this token; repeatable.", rich_help_panel=LENGTH),
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos", help="Don't end the answer at an end-of-text token.", rich_help_panel=LENGTH
        ),
    ] = False,
    time_limit: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="End the answer after this time, with the tokens generated so far.",
            rich_help_panel=LENGTH,
        ),
    ] = None,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Print each token's log-probability after the answer.")
    ] = False,
    top_logprobs: Annotated[
        int,
        typer.Option(
            metavar="N",
            show_default=False,
            help="Print each position's N likeliest tokens as well, at most 20.",
        ),
    ] = 0,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before the answer.")] = False,
    timeout: Timeout = None,
    server: Server = DEFAULT_SERVER,
    as_json: AsJson = False,
) -> None:
    """Generate an answer and print it."""
    text = _standard_input() if prompt == STANDARD_INPUT else prompt
    single, several = adapter_refs(adapter)
    options: GenerateOptions = {
        "adapter": single,
        "adapters": several,
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": dict(map(_bias, logit_bias or ())),
        "stop": stop or (),
        "stop_token_ids": stop_token_id or (),
        "ignore_eos": ignore_eos,
        "time_limit": time_limit,
        "return_token_ids": as_json,
        "logprobs": logprobs,
        "top_logprobs": top_logprobs,
        "echo": echo,
    }
    if combination_type is not None:
        options["combination_type"] = combination_type
    if lora_path is not None:
        options["lora_path"] = lora_path
    streaming = sys.stdout.isatty() and not as_json if stream is None else stream
    with Client(server, timeout=timeout) as client:
        if chat is None:
            chat = client.model(adapter=single, adapters=several).has_chat_template
        if chat:
            options["chat"], bare = [{"role": "user", "content": text}], None
        else:
            bare = text
        if streaming:
            with client.stream(bare, **options) as chunks:
                _print_chunks(chunks, as_json)
        else:
            answer = client.generate(bare, **options)
            print(to_json(answer) if as_json else answer.text)
            if not as_json:
                print_logprobs(answer.logprobs)
            _print_summary(answer)


def _standard_input() -> str:
    """All of it. It is UTF-8 whatever the console's encoding."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise typer.BadParameter("standard input isn't UTF-8", param_hint="prompt") from None


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise typer.BadParameter(f"expected ID=VALUE, got {text!r}", param_hint="--logit-bias") from None


def _print_chunks(stream: Stream, as_json: bool) -> None:
    """Print chunks as they come; as JSON one line each, the last with the whole answer."""
    for chunk in stream:
        if as_json:
            print(to_json(chunk, indent=None), flush=True)
        else:
            print(chunk.text, end="", flush=True)
    answer = stream.until_done()
    if not as_json:
        print()
        print_logprobs(answer.logprobs)
    _print_summary(answer)


def _print_summary(answer: Generation) -> None:
    """Say on a terminal what the text doesn't; a pipe gets nothing but the answer."""
    if not sys.stderr.isatty():
        return
    tokens, timings = answer.usage.completion_tokens, answer.timings
    print(
        f"[{answer.finish_reason}, {answer.usage.prompt_tokens} + {tokens} tokens, first after "
        f"{timings.time_to_first_token:.2f} s, all after {timings.total:.2f} s, seed {answer.seed}, "
        f"{answer.lora_path.lower()}]",
        file=sys.stderr,
    )
