"""Keys take turns, and none holds up another."""

from __future__ import annotations

import asyncio
import threading

import pytest

from polygraft.engine.workers.fair_workers import FairWorkers
from polygraft.errors import PolygraftError, ResourceExhausted


async def test_a_key_that_hangs_holds_up_itself_alone() -> None:
    workers = FairWorkers("tests", threads=2, max_waiting=100)
    go_on = threading.Event()
    hanging = [asyncio.ensure_future(workers.run("bad", lambda: go_on.wait(60))) for _ in range(10)]
    for at in range(20):
        assert await workers.run(f"good-{at % 3}", lambda: threading.current_thread().name) == "tests"
    assert not any(one.done() for one in hanging)
    go_on.set()
    assert all(await asyncio.gather(*hanging))
    assert not workers._waiting
    while workers._running:  # a thread leaves it a moment after its caller has the result
        await asyncio.sleep(0.001)


async def test_a_key_has_one_thread_and_its_own_order() -> None:
    workers = FairWorkers("tests", threads=4, max_waiting=100)
    running: set[str] = set()
    order: dict[str, list[int]] = {"a": [], "b": []}

    def call(key: str, at: int) -> None:
        assert key not in running
        running.add(key)
        order[key].append(at)
        running.discard(key)

    await asyncio.gather(
        *(workers.run(key, lambda key=key, at=at: call(key, at)) for at in range(50) for key in order)
    )
    assert order == {"a": list(range(50)), "b": list(range(50))}


async def test_keys_take_turns() -> None:
    workers = FairWorkers("tests", threads=1, max_waiting=100)
    go_on, order = threading.Event(), []
    first = asyncio.ensure_future(workers.run("first", lambda: go_on.wait(60)))
    while not workers._running:
        await asyncio.sleep(0.001)
    later = [asyncio.ensure_future(workers.run(key, lambda key=key: order.append(key))) for key in "aaabbc"]
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(first, *later)
    assert order == ["a", "b", "c", "a", "b", "a"]


async def test_a_keys_queue_is_bounded_and_the_cancelled_leave_it() -> None:
    workers = FairWorkers("tests", threads=1, max_waiting=2)
    go_on = threading.Event()
    released: list[int] = []
    running = asyncio.ensure_future(workers.run("a", lambda: go_on.wait(60) and 7, release=released.append))
    while not workers._running:
        await asyncio.sleep(0.001)
    waiting = [asyncio.ensure_future(workers.run("a", lambda: 1)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted, match="2 tests of a are waiting, the limit is 2"):
        await workers.run("a", lambda: 1)
    waiting[0].cancel()
    running.cancel()
    await asyncio.sleep(0)
    go_on.set()
    assert await waiting[1] == 1
    assert await workers.run("a", lambda: 2) == 2
    assert released == [7]


async def test_whatever_a_call_raises_comes_out() -> None:
    workers = FairWorkers("tests", threads=1, max_waiting=2)

    def fail() -> None:
        raise SystemExit(3)

    with pytest.raises(PolygraftError, match="SystemExit"):
        await workers.run("a", fail)
    assert await workers.run("a", lambda: 1) == 1
