"""What a caller without any authorisation can send."""

from __future__ import annotations

import asyncio

import grpc

from polygraft_api.v1 import inference_pb2 as pb
from tests.attacks.target import Target, attack, chat, counted, inference, outcome

ROUNDS = 6


async def _send(
    target: Target, method: str, request: object, rounds: int = ROUNDS, timeout: float = 60
) -> str:
    """The same call again and again, two at a time."""
    async with target.channel() as channel:
        call = getattr(inference(channel), method)
        found = []
        for _ in range(rounds):
            found += await asyncio.gather(*(outcome(call(request, timeout=timeout)) for _ in range(2)))
        return counted(found)


@attack
async def a_chat_of_800_000_empty_messages(target: Target) -> str:
    message = pb.ChatMessage(role="u")
    return await _send(target, "Generate", pb.GenerateRequest(chat=pb.Chat(messages=[message] * 800_000)))


@attack
async def a_chat_of_20_000_messages_tokenized(target: Target) -> str:
    return await _send(target, "Tokenize", pb.TokenizeRequest(chat=chat(*["hello there"] * 20_000)))


@attack
async def tokenize_660_000_characters(target: Target) -> str:
    return await _send(target, "Tokenize", pb.TokenizeRequest(prompt="word and " * 73_000))


@attack
async def tokenize_text_without_spaces(target: Target) -> str:
    return await _send(target, "Tokenize", pb.TokenizeRequest(prompt="ab" * 30_000))


@attack
async def detokenize_4_million_ids(target: Target) -> str:
    return await _send(target, "Detokenize", pb.DetokenizeRequest(token_ids=[7] * 4_000_000))


@attack
async def a_prompt_of_4_million_ids(target: Target) -> str:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[7] * 4_000_000))
    return await _send(target, "Generate", request)


@attack
async def a_million_logit_biases(target: Target) -> str:
    sampling = pb.SamplingOptions(logit_bias=dict.fromkeys(range(250_000), 1.0))
    return await _send(target, "Generate", pb.GenerateRequest(prompt="hi", sampling=sampling))


@attack
async def half_a_million_adapters_in_a_request(target: Target) -> str:
    request = pb.GenerateRequest(prompt="hi", adapters=[pb.AdapterRef(name="a")] * 500_000)
    return await _send(target, "Generate", request)


@attack
async def score_256_continuations_of_a_long_prompt(target: Target) -> str:
    prompt = "The sea was calm and the ship went on. " * 700
    request = pb.ScoreRequest(prompt=prompt, continuations=[f" {at} more" for at in range(256)])
    return await _send(target, "Score", request, rounds=1, timeout=240)


@attack
async def prompts_of_8_000_tokens(target: Target) -> str:
    prompts = [pb.TokenIds(ids=[1000 + (at * 31 + start) % 9000 for at in range(8000)]) for start in range(4)]
    stopping = pb.StoppingOptions(max_new_tokens=4, ignore_eos=True)
    async with target.channel() as channel:
        calls = [
            inference(channel).Generate(pb.GenerateRequest(token_ids=ids, stopping=stopping), timeout=300)
            for ids in prompts
        ]
        return counted(await asyncio.gather(*map(outcome, calls)))


@attack
async def temperatures_that_vanish(target: Target) -> str:
    sampling = [pb.SamplingOptions(temperature=10.0**-at, seed=1) for at in (5, 20, 38, 45, 300, 320)]
    stopping = pb.StoppingOptions(max_new_tokens=8)
    async with target.channel() as channel:
        texts = []
        for one in sampling:
            request = pb.GenerateRequest(chat=chat("Say hello."), sampling=one, stopping=stopping)
            try:
                texts.append((await inference(channel).Generate(request, timeout=60)).text[:20])
            except grpc.aio.AioRpcError as error:
                texts.append(error.code().name)
        return repr(texts)


@attack
async def streams_that_nobody_reads(target: Target) -> str:
    request = pb.GenerateRequest(
        prompt="Once upon a time",
        stopping=pb.StoppingOptions(max_new_tokens=400, ignore_eos=True),
        response=pb.ResponseOptions(logprobs=True, top_logprobs=20, token_ids=True),
    )
    channels = [target.channel() for _ in range(40)]
    calls = [inference(channel).GenerateStream(request, timeout=600) for channel in channels]
    await asyncio.gather(*(call.read() for call in calls))
    await asyncio.sleep(60)
    for call, channel in zip(calls, channels, strict=True):
        call.cancel()
        await channel.close()
    return "40 streams of which one message was read, for a minute"
