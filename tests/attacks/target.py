"""What an attack is, and the server that it has before it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from polygraft_api.v1 import adapters_pb2 as ap
from polygraft_api.v1 import adapters_pb2_grpc, inference_pb2_grpc
from polygraft_api.v1 import inference_pb2 as pb

MESSAGE_BYTES = 2**26
"""What the attacker's own side allows: the server's limit is the one on trial."""


@dataclass(frozen=True, slots=True)
class Target:
    """A running server.

    Args:
        grpc, metrics: HOST:PORT.
        store: its folder of adapters, which may be written to.
    """

    grpc: str
    metrics: str
    store: Path

    def channel(self) -> grpc.aio.Channel:
        """A connection of its own."""
        options = [
            ("grpc.max_send_message_length", MESSAGE_BYTES),
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        return grpc.aio.insecure_channel(self.grpc, options=options)


Attack = Callable[[Target], Awaitable[str]]
"""Does its worst, and says in a phrase what the server answered."""

ATTACKS: dict[str, Attack] = {}
"""By name, in the order in which they run."""


def attack(function: Attack) -> Attack:
    """Add an attack to the list, under its function's name."""
    ATTACKS[function.__name__.replace("_", " ")] = function
    return function


def inference(channel: grpc.aio.Channel) -> Any:
    """Calls of InferenceService."""
    return inference_pb2_grpc.InferenceServiceStub(channel)


def adapters(channel: grpc.aio.Channel) -> Any:
    """Calls of AdapterService."""
    return adapters_pb2_grpc.AdapterServiceStub(channel)


async def outcome(call: Any) -> str:
    """The code with which a call ends, and the beginning of its text."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name}: {(error.details() or '')[:100]}"
    return "OK"


async def load(target: Target, name: str) -> str:
    """Load a folder of the store, and unload it if that went well."""
    async with target.channel() as channel:
        result = await outcome(adapters(channel).LoadAdapter(ap.LoadAdapterRequest(name=name), timeout=300))
        if result == "OK":
            await outcome(adapters(channel).UnloadAdapter(ap.UnloadAdapterRequest(name=name), timeout=60))
        return result


def counted(outcomes: list[str]) -> str:
    """How often each outcome came."""
    kinds: dict[str, int] = {}
    for one in outcomes:
        kinds[one[:70]] = kinds.get(one[:70], 0) + 1
    return "; ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))


def chat(*contents: str) -> pb.Chat:
    """A chat of a user's messages."""
    return pb.Chat(messages=[pb.ChatMessage(role="user", content=content) for content in contents])
