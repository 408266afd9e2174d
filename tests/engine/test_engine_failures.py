"""Whatever ends the engine ends every request and every command, each once, and says so."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from polygraft.core.output import RequestOutput
from polygraft.errors import EngineDead, PolygraftError
from polygraft_types.adapters import AdapterState
from polygraft_types.requests import Request
from tests.engine.stores import copy_of
from tests.engine.test_async_engine import PROMPT, Running
from tests.engines import greedy, make_engine


class Panic(BaseException):
    """As pyo3 raises for a panic in Rust."""


ERRORS = [RuntimeError, MemoryError, SystemExit, KeyboardInterrupt, Panic]


def raiser(error: type[BaseException]) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error("out of order")

    return fail


class Doomed:
    """An engine with requests on their way and a command that waits, held until its end."""

    def __init__(self, model: Path, **settings: object) -> None:
        self.running = Running(make_engine(model, **settings), 100)
        self.handle = self.running.handle
        self.engine = self.running.engine
        self.running.paused.set()
        self.handle.start()
        self.outputs: dict[str, list[RequestOutput]] = {}

    async def begin(self) -> None:
        self.tasks = [asyncio.create_task(self._read(f"r{at}")) for at in range(3)]
        self.command = asyncio.create_task(self.handle._command(lambda done: None))
        while len(self.handle._streams) < 3 or not self.handle._commands._unanswered:
            await asyncio.sleep(0)

    async def _read(self, id: str) -> None:
        seen = self.outputs[id] = []
        async for output in self.handle.generate(greedy(id, PROMPT, None, 50)):
            seen.append(output)

    async def check_ended(self) -> None:
        async with asyncio.timeout(30):
            await self.handle.wait_failed()
            for waiting in (*self.tasks, self.command):
                with pytest.raises(EngineDead):
                    await waiting
        assert not any(output.terminal for seen in self.outputs.values() for output in seen)
        assert self.handle.failure is not None
        books = self.running.recorder
        assert books.submitted == books.finished
        assert [type(end) for end in books.ends] == [EngineDead] * 3
        for late in (lambda: anext(self.handle.generate(greedy("late", PROMPT, None, 3))),
                     lambda: self.handle.unload_adapter("any")):  # fmt: skip
            with pytest.raises(EngineDead):
                await late()
        assert await asyncio.wait_for(self.handle.drain(30.0), 10) == 0


@pytest.fixture
def doomed(llama: Path) -> Callable[..., Doomed]:
    return lambda **settings: Doomed(llama, **settings)


@pytest.mark.parametrize("error", ERRORS)
async def test_what_a_step_raises(doomed: Callable[..., Doomed], error: type[BaseException]) -> None:
    end = doomed()
    await end.begin()
    end.engine.runner.run = raiser(error)  # type: ignore[method-assign]
    end.running.paused.clear()
    await end.check_ended()
    assert isinstance(end.handle.failure, error)


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, Panic])
async def test_what_a_command_raises(doomed: Callable[..., Doomed], error: type[BaseException]) -> None:
    end = doomed()
    await end.begin()
    end.handle._engine_loop.post(raiser(error))
    await end.check_ended()


@pytest.mark.parametrize("error", [RuntimeError, Panic])
async def test_what_a_job_in_the_background_raises(
    doomed: Callable[..., Doomed], error: type[BaseException]
) -> None:
    def job() -> Iterator[None]:
        yield None
        raise error("out of order")

    end = doomed()
    await end.begin()
    end.handle._engine_loop.post(lambda: end.engine.background.add(job()))
    end.handle._engine_loop.post(end.running.paused.clear)
    await end.check_ended()


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
@pytest.mark.parametrize("method", ["tokens_generated", "step_finished", "occupancy_changed"])
async def test_what_an_observer_raises_while_outputs_are_delivered(
    doomed: Callable[..., Doomed], method: str, error: type[BaseException]
) -> None:
    end = doomed()
    await end.begin()
    setattr(end.running.recorder, method, raiser(error))
    end.running.paused.clear()
    await end.check_ended()


async def test_an_end_that_cant_be_counted_is_still_told(doomed: Callable[..., Doomed]) -> None:
    end = doomed()
    await end.begin()
    end.running.recorder.request_finished = raiser(RuntimeError)  # type: ignore[method-assign]
    end.handle._engine_loop.post(raiser(RuntimeError))
    for waiting in (*end.tasks, end.command):
        with pytest.raises(EngineDead):
            await asyncio.wait_for(waiting, 30)


async def test_a_step_that_hangs(doomed: Callable[..., Doomed], caplog: pytest.LogCaptureFixture) -> None:
    end = doomed(step_timeout=0.2)
    await end.begin()
    release = threading.Event()

    def hang_in_the_model(*_: object) -> Any:
        release.wait(60)
        raise RuntimeError("it came back")

    end.engine.runner.run = hang_in_the_model  # type: ignore[method-assign]
    end.running.paused.clear()
    await end.check_ended()
    assert "--step-timeout" in caplog.text
    assert "hang_in_the_model" in caplog.text, "the log shows where it hangs"
    release.set()
    assert end.handle._ended is not None
    with pytest.raises(RuntimeError, match="it came back"):
        await asyncio.wait_for(asyncio.wrap_future(end.handle._ended), 10)
    await asyncio.sleep(0.01)
    assert len(end.running.recorder.ends) == 3, "what comes late is told to nobody"


async def test_an_engine_that_rests_doesnt_hang(llama: Path) -> None:
    running = Running(make_engine(llama, step_timeout=0.1), 100)
    running.handle.start()
    await asyncio.sleep(0.4)
    assert running.handle.failure is None
    assert len(await running.tokens(greedy("r", PROMPT, None, 3))) == 3
    await running.handle.drain(10.0)


async def test_a_thread_that_is_gone(doomed: Callable[..., Doomed]) -> None:
    end = doomed(step_timeout=0.2)
    await end.begin()
    gone = threading.Thread(target=lambda: None)
    gone.start()
    gone.join()
    end.handle._watchdog._watched = gone
    await end.check_ended()
    assert "has ended" in str(end.handle.failure)


async def test_a_drain_ends_when_the_engine_dies_meanwhile(doomed: Callable[..., Doomed]) -> None:
    end = doomed()
    await end.begin()
    drain = asyncio.create_task(end.handle.drain(3600.0))
    await asyncio.sleep(0)
    end.handle._engine_loop.post(raiser(RuntimeError))
    assert await asyncio.wait_for(drain, 30) == 0
    for waiting in (*end.tasks, end.command):
        with pytest.raises(EngineDead):
            await waiting


async def test_a_panic_while_a_request_is_prepared_is_that_requests_own(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Running(make_engine(llama), 100)
    running.handle.start()
    with monkeypatch.context() as patch:
        patch.setattr(running.engine.intake, "prepare", raiser(SystemExit))
        long = "x" * 5000
        with pytest.raises(PolygraftError, match="SystemExit: out of order"):
            await running.collect(Request("r", long))
    assert len(await running.tokens(greedy("r", PROMPT, None, 3))) == 3
    await running.handle.drain(10.0)


async def test_a_panic_in_a_load_is_that_loads_own(
    llama: Path, llama_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copy_of(llama_store, tmp_path / "store", "lora")
    running = Running(make_engine(llama, store), 100)
    running.handle.start()
    with monkeypatch.context() as patch:
        patch.setattr(running.engine.adapters._prompts, "read", raiser(Panic))
        with pytest.raises(PolygraftError, match="Panic: out of order"):
            await running.handle.load_adapter("other", "lora")
    assert running.handle.failure is None
    assert (await running.handle.load_adapter("other", "lora")).state is AdapterState.READY
    await running.settle()
    await running.handle.drain(10.0)
