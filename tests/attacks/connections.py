"""What a peer can do below the level of calls."""

from __future__ import annotations

import asyncio

from tests.attacks.target import Target, attack


@attack
async def three_hundred_idle_connections_to_the_metrics(target: Target) -> str:
    if not target.metrics:
        return "metrics are off"
    host, port = target.metrics.rsplit(":", 1)
    opened = []
    refused = 0
    for _ in range(300):
        try:
            opened.append(await asyncio.wait_for(asyncio.open_connection(host, int(port)), 5))
        except (OSError, TimeoutError):
            refused += 1
    await asyncio.sleep(5)
    for _, writer in opened:
        writer.close()
    return f"{len(opened)} opened, {refused} refused"


@attack
async def garbage_on_the_grpc_port(target: Target) -> str:
    host, port = target.grpc.rsplit(":", 1)
    for data in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4096,
        b"\0" * 65536,
    ):
        for _ in range(50):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(data)
            await writer.drain()
            writer.close()
    return "150 connections of bytes that are no HTTP/2"
