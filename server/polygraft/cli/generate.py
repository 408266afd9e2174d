"""`polygraft generate`: one answer from a running server."""

from __future__ import annotations

import sys
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
from polygraft_client import Client, GenerateOptions, Generation, LoraPath, Stream

STANDARD_INPUT = "-"


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    adapter: AdapterNames = None,
    combination_type: Combination = None,
    lora_path: Annotated[
        LoraPath | None,
        typer.Option(
            case_sensitive=False,
            help="How low-rank weights are applied: beside the base's (unmerged), folded into a copy "
            "(merged), or as the server decides (auto). [default: the server's]",
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="As a user's message, or as bare text. [default: --chat if there is a template, the model's "
            "or the adapter's]",
        ),
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream", help="Print as it is generated. [default: --stream on a terminal]"
        ),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate.")] = None,
    min_new_tokens: Annotated[int | None, typer.Option(help="Fewest tokens to generate.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; at most 100.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this share.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens below this share of the likeliest's probability.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling. [default: drawn]")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1, what is there already becomes less likely.")
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(help="Off the logits of tokens in the answer; -2 to 2.")
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(help="The same, times how often; -2 to 2.")
    ] = None,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=VALUE", help="Add to a token's logit; repeatable.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; repeatable.")] = None,
    stop_token_id: Annotated[list[int] | None, typer.Option(help="Stop at this token; repeatable.")] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end of the text.")
    ] = False,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds after which the answer ends where it is.")
    ] = None,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Print each token's log-probability after the answer.")
    ] = False,
    top_logprobs: Annotated[
        int, typer.Option(help="The same with so many of the likeliest tokens; at most 20.")
    ] = 0,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before the answer.")] = False,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which the call fails.")] = None,
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
