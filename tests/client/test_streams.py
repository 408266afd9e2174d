"""Streaming: chunks, the whole answer, and cancelling in every way a caller may leave."""

from __future__ import annotations

import asyncio
import threading

import pytest

from polygraft_client import AsyncClient, Cancelled, Client, DeadlineExceeded

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


def test_chunks_and_the_whole(client: Client) -> None:
    stream = client.stream("Hello", return_token_ids=True)
    chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == "one two three"
    assert [chunk.token_ids for chunk in chunks] == [(10,), (11,), (12,), ()]
    assert [chunk.generation is None for chunk in chunks] == [True, True, True, False]
    assert stream.generation is not None
    assert stream.generation == client.generate("Hello", return_token_ids=True)


def test_until_done(client: Client) -> None:
    with client.stream("Hello") as stream:
        assert next(stream).text == "one "
        assert stream.generation is None
        assert stream.until_done().text == "one two three"


def test_leaving_the_block_cancels(client: Client, held: Script) -> None:
    with client.stream("Hello") as stream:
        next(stream)
    assert held.ended.wait(PATIENCE)
    assert list(stream) == []
    with pytest.raises(Cancelled):
        stream.until_done()


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


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_deadline(client: Client, held: Script, method: str) -> None:
    with pytest.raises(DeadlineExceeded, match=client.address):
        list(getattr(client, method)("Hello", timeout=0.2))
    assert held.ended.wait(PATIENCE)


def test_deadline_of_the_client(server: ScriptedServer, held: Script) -> None:
    with Client(server.address, timeout=0.2) as client, pytest.raises(DeadlineExceeded):
        client.generate("Hello")


async def test_async_chunks_and_the_whole(server: ScriptedServer) -> None:
    async with AsyncClient(server.address) as client:
        stream = client.stream("Hello")
        assert [chunk.text async for chunk in stream] == ["one ", "two ", "three", ""]
        assert stream.generation == await client.generate("Hello")
        async with client.stream("Hello") as stream:
            assert (await stream.until_done()).text == "one two three"


async def test_async_leaving_the_block_cancels(server: ScriptedServer, held: Script) -> None:
    async with AsyncClient(server.address) as client:
        async with client.stream("Hello") as stream:
            await anext(stream)
        assert await asyncio.to_thread(held.ended.wait, PATIENCE)
        assert [chunk async for chunk in stream] == []
        with pytest.raises(Cancelled):
            await stream.until_done()


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


async def test_async_deadline(server: ScriptedServer, held: Script) -> None:
    async with AsyncClient(server.address, timeout=0.2) as client:
        with pytest.raises(DeadlineExceeded):
            await client.generate("Hello")
        with pytest.raises(DeadlineExceeded):
            await client.stream("Hello").until_done()
