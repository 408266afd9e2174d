"""Polygraft behind its gRPC server, as a client sees it."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.peers.cases import CASES, IN_FLIGHT, Ask, answer
from benchmarks.sides.protocol import answer_rounds
from benchmarks.workload import NEW_TOKENS
from polygraft.cli.demo.launcher import ServerProcess, serve_command
from polygraft_client import AsyncClient

READY_SECONDS = 300


async def ask_all(address: str, asks: Sequence[Ask]) -> tuple[list[list[int]], list[float]]:
    """Keep as many requests running as may be in flight; token ids and seconds to the first, by request."""
    outputs: list[list[int]] = [[] for _ in asks]
    first_tokens = [0.0] * len(asks)
    left = iter(range(len(asks)))

    async def worker(client: AsyncClient) -> None:
        for n in left:
            started = time.perf_counter()
            async with client.stream(
                token_ids=asks[n].prompt,
                adapter=asks[n].adapter,
                max_new_tokens=NEW_TOKENS,
                ignore_eos=True,
                temperature=0.0,
                return_token_ids=True,
            ) as stream:
                async for chunk in stream:
                    if chunk.token_ids and not outputs[n]:
                        first_tokens[n] = time.perf_counter() - started
                    outputs[n] += chunk.token_ids

    async with AsyncClient(address) as client:
        await asyncio.gather(*(worker(client) for _ in range(IN_FLIGHT)))
    return outputs, first_tokens


def main() -> None:
    store, quantization, head = sys.argv[1:]
    command = serve_command(
        "--adapters", store, "--kv-cache-bytes", "128MiB", "--threads", "2",
        "--quantization", quantization, "--head-quantization", head, "--dtype", "bfloat16",
        "--no-prefix-caching",  # rounds repeat their prompts
    )  # fmt: skip
    with ServerProcess(command) as server:
        where = server.wait_ready(READY_SECONDS, report=lambda line: None)

        def run(case: str) -> dict[str, Any]:
            started = time.perf_counter()
            outputs, first_tokens = asyncio.run(ask_all(where.grpc, CASES[case]))
            seconds = time.perf_counter() - started
            return answer(outputs, seconds, ttft_s=statistics.median(first_tokens))

        answer_rounds(run)


if __name__ == "__main__":
    main()
