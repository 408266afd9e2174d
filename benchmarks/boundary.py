"""Engine on a thread of the server's process, or in a process of its own: which serves more?

Both serve the same gRPC servicers and the same engine; only the boundary between them differs. Clients run
in this process, the server in another. Base model, prompts of 16 tokens, 32 new tokens each, greedy; rounds
of both are interleaved, figures are medians. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from polygraft_client import AsyncClient

NEW_TOKENS = 32


async def burst(address: str, streams: int) -> float:
    """Output tokens per second of so many concurrent streams."""

    async def one(client: AsyncClient, n: int) -> int:
        tokens = 0
        stream = client.stream(
            token_ids=[1000 + n + i for i in range(16)],
            max_new_tokens=NEW_TOKENS,
            ignore_eos=True,
            return_token_ids=True,
        )
        async with stream:
            async for chunk in stream:
                tokens += len(chunk.token_ids)
        return tokens

    async with AsyncClient(address) as client:
        started = time.perf_counter()
        tokens = await asyncio.gather(*(one(client, n) for n in range(streams)))
        return sum(tokens) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    servers = {}
    addresses = {}
    for kind in ("thread", "process"):
        servers[kind] = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sides.boundary_server", kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        output = servers[kind].stdout
        assert output is not None
        addresses[kind] = output.readline().split()[-1]
    measured: dict[tuple[str, int], list[float]] = {}
    for n in range(args.rounds + 1):  # round 0 warms up
        for streams in (16, 256):
            for kind in servers:
                rate = asyncio.run(burst(addresses[kind], streams))
                print(f"round {n}: {kind:8} {streams:4} streams {rate:7.1f} tokens/s", flush=True)
                if n:
                    measured.setdefault((kind, streams), []).append(rate)
    for server in servers.values():
        assert server.stdin is not None
        server.stdin.close()
        server.wait(30)
    result = {f"{kind}_{streams}": statistics.median(rates) for (kind, streams), rates in measured.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
