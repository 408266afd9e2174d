"""Streaming: chunks, the whole answer, and cancelling in every way a caller may leave."""

from __future__ import annotations

import asyncio
import threading

import pytest

from polygraft_client import AsyncClient, Cancelled, Client, DeadlineExceeded

from .both import all_of, done, entered, next_chunk
from .scripted import Script, ScriptedServer

PATIENCE = 30  # seconds before a test that hangs fails


@pytest.fixture
def held(script: Script) -> Script:
    """Generations stop after their first word."""
    script.hold = threading.Event()
    return script


@pytest.fixture
def client(server: ScriptedServer):
    with Client(server.address) as client:
        yield client


@pytest.fixture
async def either(server: ScriptedServer, kind: type):
    """Each client in turn."""
    async with entered(kind(server.address)) as client:
        yield client


async def test_chunks_and_the_whole(either: Client | AsyncClient) -> None:
    stream = either.stream("Hello", return_token_ids=True)
    chunks = await all_of(stream)
    assert [chunk.text for chunk in chunks] == ["one ", "two ", "three", ""]
    assert [chunk.token_ids for chunk in chunks] == [(10,), (11,), (12,), ()]
    assert [chunk.generation is None for chunk in chunks] == [True, True, True, False]
    assert stream.generation is not None
    assert stream.generation == await done(either.generate("Hello", return_token_ids=True))


async def test_until_done(either: Client | AsyncClient) -> None:
    async with entered(either.stream("Hello")) as stream:
        assert (await next_chunk(stream)).text == "one "
        assert stream.generation is None
        assert (await done(stream.until_done())).text == "one two three"


async def test_leaving_the_block_cancels(either: Client | AsyncClient, held: Script) -> None:
    async with entered(either.stream("Hello")) as stream:
        await next_chunk(stream)
    assert await asyncio.to_thread(held.ended.wait, PATIENCE)
    assert await all_of(stream) == []
    with pytest.raises(Cancelled):
        await done(stream.until_done())


def test_breaking_out_cancels(client: Client, held: Script) -> None:
    for _ in client.stream("Hello"):
        break
    assert held.ended.wait(PATIENCE)


def test_closing_from_another_thread(client: Client, held: Script) -> None:
    stream = client.stream("Hello")
    next(stream)
    threading.Timer(0.05, stream.close).start()
    with pytest.raises(Cancelled):
        next(stream)
    assert held.ended.wait(PATIENCE)


def test_closing_after_the_end_changes_nothing(client: Client) -> None:
    stream = client.stream("Hello")
    answer = stream.until_done()
    stream.close()
    assert stream.generation is answer
    assert stream.until_done() is answer


async def test_deadline(either: Client | AsyncClient, held: Script) -> None:
    for call in (either.generate, lambda *given, **options: either.stream(*given, **options).until_done()):
        held.ended.clear()
        with pytest.raises(DeadlineExceeded, match=either.address):
            await done(call("Hello", timeout=0.2))
        assert await asyncio.to_thread(held.ended.wait, PATIENCE)


async def test_deadline_of_the_client(server: ScriptedServer, held: Script, kind: type) -> None:
    async with entered(kind(server.address, timeout=0.2)) as client:
        for call in (client.generate, lambda prompt: client.stream(prompt).until_done()):
            with pytest.raises(DeadlineExceeded):
                await done(call("Hello"))


async def test_async_breaking_out_cancels(server: ScriptedServer, held: Script) -> None:
    async with AsyncClient(server.address) as client:
        async for _ in client.stream("Hello"):
            break
        assert await asyncio.to_thread(held.ended.wait, PATIENCE)


async def test_async_cancelling_the_task_cancels_the_call(server: ScriptedServer, held: Script) -> None:
    async with AsyncClient(server.address) as client:
        task = asyncio.create_task(client.generate("Hello"))
        assert await asyncio.to_thread(held.arrived.wait, PATIENCE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(held.ended.wait, PATIENCE)


async def test_async_closing_from_another_task(server: ScriptedServer, held: Script) -> None:
    async with AsyncClient(server.address) as client:
        stream = client.stream("Hello")
        await anext(stream)
        waiting = asyncio.create_task(stream.until_done())
        await asyncio.sleep(0.05)
        await stream.close()
        with pytest.raises(Cancelled):
            await waiting
        assert not waiting.cancelled()


async def test_async_closing_the_client_ends_its_calls(server: ScriptedServer, held: Script) -> None:
    client = AsyncClient(server.address)
    waiting = asyncio.create_task(client.generate("Hello"))
    assert await asyncio.to_thread(held.arrived.wait, PATIENCE)
    await client.close()
    with pytest.raises(Cancelled):
        await waiting
