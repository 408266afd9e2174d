"""Calls beside the event loop: in order, bounded, and nothing is lost."""

from __future__ import annotations

import asyncio
import threading

import pytest

from polygraft.engine.workers.worker import Worker
from polygraft.errors import PolygraftError, ResourceExhausted


class Gate:
    """A call that holds its worker."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.release = threading.Event()

    def __call__(self) -> str:
        self.began.set()
        self.release.wait(30)
        return "held"

    async def until_it_runs(self) -> None:
        while not self.began.is_set():
            await asyncio.sleep(0.001)


async def test_calls_run_in_their_order_on_one_thread() -> None:
    worker, order = Worker("work", 10), []

    def call(number: int) -> str:
        order.append(number)
        return threading.current_thread().name

    assert await asyncio.gather(*(worker.run(lambda at=at: call(at)) for at in range(5))) == ["work"] * 5
    assert order == [0, 1, 2, 3, 4]


async def test_a_full_queue_refuses() -> None:
    worker, gate = Worker("large prompts", 2), Gate()
    running = asyncio.create_task(worker.run(gate))
    await gate.until_it_runs()
    waiting = [asyncio.create_task(worker.run(lambda: 1)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted, match="2 large prompts are waiting, the limit is 2"):
        await worker.run(lambda: 1)
    gate.release.set()
    assert await running == "held"
    assert await asyncio.gather(*waiting) == [1, 1]
    assert await worker.run(lambda: 2) == 2


async def test_whoever_gives_up_while_waiting_takes_the_call_along() -> None:
    worker, gate, ran = Worker("work", 10), Gate(), []
    running = asyncio.create_task(worker.run(gate))
    await gate.until_it_runs()
    waiting = asyncio.create_task(worker.run(lambda: ran.append(1)))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.release.set()
    await running
    await worker.run(lambda: None)
    assert not ran


async def test_what_nobody_takes_is_released() -> None:
    worker, gate = Worker("work", 10), Gate()
    released: list[str] = []
    running = asyncio.create_task(worker.run(gate, release=released.append))
    await gate.until_it_runs()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    gate.release.set()
    await worker.run(lambda: None)
    assert released == ["held"]


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, BaseException])
async def test_what_would_end_a_loop_comes_out_as_an_error(error: type[BaseException]) -> None:
    worker = Worker("work", 10)

    def fail() -> None:
        raise error("no")

    with pytest.raises(PolygraftError, match=f"{error.__name__}: no"):
        await worker.run(fail)
    with pytest.raises(ValueError, match="bad"):
        await worker.run(lambda: int("bad"))
    assert await worker.run(lambda: 1) == 1
