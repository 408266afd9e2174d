"""Whatever a caller sends, no callback on the event loop takes long: others' streams and health go on.

What counts is the loop thread's own CPU time, so a busy machine changes nothing.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from polygraft.config import ServerConfig
from polygraft.engine.async_engine import AsyncEngine
from polygraft.rpc.grpc_server import GrpcServer
from polygraft.telemetry.metrics import Metrics
from polygraft_api.v1 import inference_pb2 as pb
from tests.engines import make_engine
from tests.tiny import save_tiny_model

MEBIBYTE = 2**20
FULL = 4 * MEBIBYTE - 64
LIMIT = 0.020
CONTEXT = 20_000
INFERENCE = "/polygraft.v1.InferenceService/"
ADAPTERS = "/polygraft.v1.AdapterService/"
HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


def varint(value: int) -> bytes:
    data = b""
    while value > 127:
        data += bytes([value & 127 | 128])
        value >>= 7
    return data + bytes([value])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def numbers(number: int, value: int = 0) -> bytes:
    """One element of a repeated number that isn't packed."""
    return varint(number << 3) + varint(value)


def repeat(data: bytes, size: int = FULL) -> bytes:
    return data * (size // len(data))


def chat(count: int, content: str = "") -> bytes:
    return (
        field(3, repeat(field(1, field(1, b"u") + field(2, content.encode())), 1))
        if count == 0
        else field(3, field(1, field(1, b"u") + field(2, content.encode())) * count)
    )


LONG_TEXT = "The quick brown fox jumps over the lazy dog. " * (CONTEXT * 4 // 45)
# Each is one message, as large as the server takes, or as large as the context is.
NASTY: dict[str, tuple[str, bytes]] = {
    "tokenize a long text": ("Tokenize", field(1, LONG_TEXT.encode())),
    "tokenize a megabyte": ("Tokenize", field(1, b"x" * FULL)),
    "generate from a megabyte": ("Generate", field(1, b"x" * FULL)),
    "generate from what isn't UTF-8": ("Generate", field(1, b"\xff" * FULL)),
    "empty messages": ("Generate", field(3, repeat(field(1, b"")))),
    "as many messages as fit": ("Tokenize", field(2, field(1, field(1, b"u")) * (CONTEXT - 1))),
    "as many messages as fit, to answer": ("GenerateStream", chat(CONTEXT - 1)),
    "one long message": ("Generate", chat(1, LONG_TEXT)),
    "token ids": ("Generate", field(2, field(1, b"\1" * (FULL - 8)))),
    "token ids, one by one": ("Generate", field(2, repeat(numbers(1, 1)))),
    "as many token ids as fit": ("Generate", field(2, field(1, b"\1" * (CONTEXT - 300)))),
    "token ids to text": ("Detokenize", field(1, b"\1" * (FULL - 8))),
    "as many token ids to text as fit": ("Detokenize", field(1, b"\1" * CONTEXT)),
    "empty continuations": ("Score", field(1, b"x") + repeat(field(2, b""))),
    "long continuations": ("Score", field(1, b"x") + field(2, b"y" * (CONTEXT // 2)) * 20),
    "continuations of ids": ("Score", field(1, b"x") + field(6, field(1, b"\1" * (CONTEXT // 2))) * 20),
    "adapters": ("Generate", field(1, b"x") + repeat(field(5, b""))),
    "stop sequences": ("Generate", field(1, b"x") + field(8, repeat(field(3, b"")))),
    "stop tokens": ("Generate", field(1, b"x") + field(8, field(4, b"\1" * (FULL - 64)))),
    "biases": ("Generate", field(1, b"x") + field(7, b"".join(field(9, numbers(1, i)) for i in range(400_000)))),
    "unknown fields": ("Generate", field(1, b"x") + repeat(field(1000, b""))),
    "an adapter's name": ("Generate", field(1, b"x") + field(4, b"n" * FULL)),
    "a request for the model": ("GetModel", repeat(field(1000, b""))),
}  # fmt: skip
NASTY = {name: (INFERENCE + method, data) for name, (method, data) in NASTY.items()}
NASTY |= {
    "a name": (ADAPTERS + "GetAdapter", field(1, b"n" * FULL)),
    "a page": (ADAPTERS + "ListAdapters", field(2, b"A" * FULL)),
    "a source": (ADAPTERS + "LoadAdapter", field(1, b"a") + field(2, b"../" * (FULL // 3))),
    "health": (HEALTH + "Check", field(1, b"s" * FULL)),
    "health's unknown fields": (HEALTH + "Check", repeat(field(1000, b""))),
    "watching health": (HEALTH + "Watch", field(1, b"s" * FULL)),
    "reflection": (REFLECTION, field(4, b"s" * FULL)),
    "reflection's unknown fields": (REFLECTION, repeat(field(1000, b""))),
    "no such method": (INFERENCE + "Nothing", b"x" * FULL),
}


ECHO = pb.GenerateRequest(
    token_ids=pb.TokenIds(ids=[65] * 8000),
    stopping={"max_new_tokens": 2, "ignore_eos": True},
    response={"echo": True, "top_logprobs": 10, "token_ids": True},
)
SCORE = pb.ScoreRequest(
    token_ids=pb.TokenIds(ids=[65]),
    continuation_token_ids=[pb.TokenIds(ids=[66] * 4000)] * 2,
    top_logprobs=10,
)
LARGE_ANSWERS = [("Generate", ECHO), ("GenerateStream", ECHO), ("Score", SCORE)]
FIT = {
    "tokenize a long text",
    "as many messages as fit",
    "as many token ids to text as fit",
    "as many token ids as fit",
    "long continuations",
    "continuations of ids",
    "unknown fields",
}


@contextmanager
def callbacks() -> Iterator[list[tuple[float, str]]]:
    """CPU seconds of the loop's callbacks, those above 2 ms."""
    slow: list[tuple[float, str]] = []
    real = asyncio.Handle._run

    def run(self: asyncio.Handle) -> None:
        started = time.thread_time()
        real(self)
        spent = time.thread_time() - started
        if spent > 0.002:
            slow.append((spent, repr(self)[:300]))

    asyncio.Handle._run = run  # type: ignore[method-assign]
    # The tests' own heap is another's than a server's.
    gc.collect()
    gc.disable()
    try:
        yield slow
    finally:
        gc.enable()
        asyncio.Handle._run = real  # type: ignore[method-assign]


def send(address: str, method: str, data: bytes) -> str:
    """The code of one call, made from another thread so that the loop does the server's work alone."""
    with grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        streams = method.endswith(("GenerateStream", "Watch", "Info"))
        try:
            if method == REFLECTION:
                list(channel.stream_stream(method)(iter([data]), timeout=60))
            elif streams:
                list(channel.unary_stream(method)(data, timeout=60))
            else:
                channel.unary_unary(method)(data, timeout=60)
        except grpc.RpcError as error:
            return str(error.code().name)  # type: ignore[attr-defined]
        return "OK"


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roomy")
    return save_tiny_model(folder, "llama", max_position_embeddings=CONTEXT, num_hidden_layers=1)


@pytest.fixture
async def address(roomy: Path) -> AsyncIterator[str]:
    engine = make_engine(roomy, max_num_batched_tokens=4096, kv_cache_bytes=8 * MEBIBYTE)
    metrics = Metrics()
    handle = AsyncEngine(engine, metrics, max_waiting=64)
    handle.start()
    server = GrpcServer(ServerConfig(listen="127.0.0.1:0", metrics=""), handle, metrics)
    yield f"127.0.0.1:{await server.start()}"
    await server.stop(None)
    await handle.drain(5.0)
    assert handle.failure is None


async def measured(address: str, method: str, data: bytes) -> tuple[str, list[tuple[float, str]]]:
    with ThreadPoolExecutor(1) as client, callbacks() as slow:
        code = await asyncio.get_running_loop().run_in_executor(client, send, address, method, data)
        await asyncio.sleep(0.01)
    return code, sorted(slow, reverse=True)


async def slowest(address: str, method: str, data: bytes) -> tuple[str, list[tuple[float, str]]]:
    """The code, and the slowest callbacks, of a try that kept the limit, or else the third: what a message costs,
    it costs each time, and what else the machine does it doesn't."""
    tries = [await measured(address, method, data)]
    while len(tries) < 3 and tries[-1][1] and tries[-1][1][0][0] >= LIMIT:
        tries.append(await measured(address, method, data))
    return tries[-1]


async def test_no_message_holds_the_loop(address: str) -> None:
    for name, (method, data) in NASTY.items():
        code, slow = await slowest(address, method, data)
        expected = (
            "UNIMPLEMENTED" if name == "no such method" else "OK" if name in FIT else "INVALID_ARGUMENT"
        )
        assert code == expected, name
        assert not slow or slow[0][0] < LIMIT, (name, slow[:3])


async def test_no_answer_holds_the_loop(address: str) -> None:
    for method, request in LARGE_ANSWERS:
        code, slow = await slowest(address, INFERENCE + method, request.SerializeToString())
        assert code == "OK"
        assert not slow or slow[0][0] < LIMIT, (method, slow[:3])
