"""Loads wait for room before their files are read, in their order, and give it back whatever becomes of them."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path

import pytest

from polygraft.adapters.files.folder import AdapterFolder
from polygraft.adapters.files.store import AdapterStore
from polygraft.engine.async_engine import AsyncEngine
from polygraft.engine.loading import load_memory
from polygraft.engine.loading.load_memory import LOADS_AT_ONCE, LoadMemory, LoadQueue
from polygraft.errors import AdapterInvalid, PolygraftError, ResourceExhausted
from polygraft.telemetry.metrics import Metrics
from polygraft_types.adapters import AdapterState
from tests.engine.stores import change, copy_of, load
from tests.engines import make_engine

MIB = 2**20


def test_the_budget_is_of_what_loads_take_and_not_of_their_files() -> None:
    memory = LoadMemory(12 * MIB)
    first = memory.take(2 * MIB)
    assert first is not None
    assert memory.take(2 * MIB) is None
    second = memory.take(MIB)
    assert second is not None
    assert memory.take(0) is None
    first.give_back()
    first.give_back()
    assert memory.take(2 * MIB) is not None
    assert memory.take(0) is None


def test_one_that_is_larger_than_the_budget_goes_alone() -> None:
    memory = LoadMemory(MIB)
    large = memory.take(100 * MIB)
    assert large is not None
    assert memory.take(0) is None
    large.give_back()
    assert memory.take(0) is not None
    assert memory.take(100 * MIB) is None


def test_no_more_than_so_many_at_once() -> None:
    memory = LoadMemory(2**40)
    assert all(memory.take(0) is not None for _ in range(LOADS_AT_ONCE))
    assert memory.take(0) is None


async def test_they_enter_in_their_order() -> None:
    queue = LoadQueue(LoadMemory(8 * MIB))
    order: list[str] = []

    async def one(name: str, size: int) -> None:
        ticket = await queue.enter(size)
        order.append(name)
        await asyncio.sleep(0.01)
        queue.leave(ticket)

    # The small one behind the large one waits as well, or the large one might wait for ever.
    await asyncio.gather(one("a", MIB), one("large", 50 * MIB), one("b", 0), one("c", MIB))
    assert order == ["a", "large", "b", "c"]


async def test_who_gives_up_lets_others_in() -> None:
    queue = LoadQueue(LoadMemory(4 * MIB))
    first = await queue.enter(MIB)
    large, small = asyncio.ensure_future(queue.enter(50 * MIB)), asyncio.ensure_future(queue.enter(0))
    await asyncio.sleep(0)
    large.cancel()
    await asyncio.gather(large, return_exceptions=True)
    queue.leave(first)
    small.cancel()  # it has its turn, and never takes it
    await asyncio.gather(small, return_exceptions=True)
    assert (await queue.enter(50 * MIB)) is not None


async def test_not_too_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_memory, "MAX_WAITING", 1)
    queue = LoadQueue(LoadMemory(1))
    await queue.enter(0)
    waiting = asyncio.ensure_future(queue.enter(0))
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted, match="loads of adapters are waiting"):
        await queue.enter(0)
    waiting.cancel()


@pytest.fixture
def store(llama_store: Path, tmp_path: Path) -> Path:
    store = copy_of(llama_store, tmp_path / "store", "lora")
    for n in range(12):
        shutil.copytree(store / "lora", tmp_path / "more" / f"copy-{n}")
    return store


async def test_files_of_loads_that_wait_are_not_read(
    llama: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llama, store, loading_bytes=1)
    for folder in (tmp_path / "more").iterdir():
        folder.rename(store / folder.name)
    change(store / "copy-3", use_qalora=True)
    read, lock = AdapterStore.read, threading.Lock()
    at_once: list[int] = []

    def counting(self: AdapterStore, name: str, source: str, most: int | None = None) -> AdapterFolder:
        with lock:
            states = [info.state for info in engine.adapters.registry.list()]
            at_once.append(states.count(AdapterState.LOADING))
        return read(self, name, source, most)

    monkeypatch.setattr(AdapterStore, "read", counting)
    handle = AsyncEngine(engine, Metrics(), max_waiting=1)
    handle.start()
    try:
        given_up = asyncio.ensure_future(handle.load_adapter("copy-11"))
        loads = [handle.load_adapter(f"copy-{n}") for n in range(11)]
        running = asyncio.gather(*loads, return_exceptions=True)
        await asyncio.sleep(0.05)
        given_up.cancel()
        done = await running
        assert [type(one) for one in done if isinstance(one, Exception)] == [AdapterInvalid]
        with pytest.raises(PolygraftError):
            await handle.load_adapter("no-such-folder")
        assert (await handle.load_adapter("copy-11")).state is AdapterState.READY
    finally:
        await handle.drain(1.0)
    assert len(at_once) >= 12
    assert max(at_once) == 0
    assert engine.adapters.memory.take(2**30) is not None  # everything was given back


def test_what_was_freed_is_given_back(
    llama: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bool] = []
    monkeypatch.setattr("polygraft.engine.loading.adapter_manager.give_back", lambda: given.append(True))
    engine = make_engine(llama, store)
    assert given == []  # not for a few kilobytes
    monkeypatch.setattr("polygraft.engine.loading.adapter_manager._WORTH_GIVING_BACK", 1)
    (tmp_path / "more" / "copy-1").rename(store / "copy-1")
    load(engine, "copy-1")
    assert given == [True]


def test_a_files_bytes_are_not_kept_beside_its_tensors(llama: Path, store: Path, tmp_path: Path) -> None:
    engine = make_engine(llama, store)
    (tmp_path / "more" / "copy-1").rename(store / "copy-1")
    folder = engine.adapters.store.read("copy-1", "copy-1")
    size = folder.disk_bytes
    folder.take_tensors()
    assert folder.disk_bytes == size
    with pytest.raises(AssertionError, match="taken already"):
        folder.take_tensors()
