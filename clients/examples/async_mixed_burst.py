"""Requests for the base model and for every adapter, all at once: they share the server's steps.

polygraft serve --adapters adapters
python clients/examples/async_mixed_burst.py [HOST:PORT]
"""

import asyncio
import sys
import time

from polygraft_client import AsyncClient, Generation, PolygraftError

MESSAGE = [{"role": "user", "content": "I can't log in to my account."}]


async def main(address: str) -> None:
    async with AsyncClient(address, timeout=120) as client:
        names = [adapter.name async for adapter in client.adapters.list() if adapter.state == "READY"]

        async def ask(name: str | None) -> Generation:
            return await client.generate(chat=MESSAGE, adapter=name, max_new_tokens=32)

        started = time.perf_counter()
        answers = await asyncio.gather(ask(None), *map(ask, names))
        seconds = time.perf_counter() - started

    for name, answer in zip(["base", *names], answers, strict=True):
        print(f"{name}: {answer.text!r}")
    tokens = sum(answer.usage.completion_tokens for answer in answers)
    print(f"{len(answers)} requests, {tokens} tokens, {tokens / seconds:.0f} tokens/s")


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:] or ["127.0.0.1:50051"]))
    except PolygraftError as error:
        sys.exit(f"error: {error}")
