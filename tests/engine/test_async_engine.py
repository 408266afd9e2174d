"""The engine beside an event loop: streams, commands, and how all of it ends."""

from __future__ import annotations

import asyncio
import gc
import shutil
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from polygraft.core.output import RequestOutput
from polygraft.engine.async_engine import AsyncEngine
from polygraft.engine.client import Occupancy, StepStats
from polygraft.engine.engine import Engine
from polygraft.engine.step_result import StepResult
from polygraft.errors import (
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    AdapterUnavailable,
    Draining,
    EngineDead,
    InvalidRequest,
    PolygraftError,
    ResourceExhausted,
)
from polygraft.telemetry.metrics import Metrics
from polygraft_types.adapters import AdapterInfo, AdapterState, MergeEvent
from polygraft_types.answers import Finished, FinishReason
from polygraft_types.requests import Chat, ChatMessage, LoraPath, Request
from tests.engine.stores import change, copy_of, poison, strengthen
from tests.engines import greedy, make_engine, run_greedy

PROMPT = list(range(30, 60))


class Recorder:
    """An observer that keeps the books."""

    def __init__(self) -> None:
        self.submitted: Counter[tuple[str, str]] = Counter()
        self.finished: Counter[tuple[str, str]] = Counter()
        self.ends: list[Finished | Exception] = []
        self.tokens: Counter[str] = Counter()
        self.first_tokens = 0
        self.steps: list[StepStats] = []
        self.held: list[Occupancy] = []
        self.adapters: list[tuple[str, str]] = []
        self.merges: list[MergeEvent] = []
        self.paths: list[LoraPath] = []
        self.unread: Counter[str] = Counter()
        self.unread_bytes: list[int] = []

    def request_submitted(self, adapter: str, kind: str) -> None:
        self.submitted[adapter, kind] += 1

    def tokens_generated(
        self, adapter: str, kind: str, path: str, count: int, interval: float | None
    ) -> None:
        self.tokens[adapter] += count
        self.first_tokens += interval is None

    def request_finished(
        self, adapter: str, kind: str, finished: Finished | None, error: Exception | None
    ) -> None:
        self.finished[adapter, kind] += 1
        end = finished or error
        assert end is not None
        self.ends.append(end)

    def occupancy_changed(self, occupancy: Occupancy) -> None:
        self.held.append(occupancy)

    def step_finished(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def adapter_changed(self, info: AdapterInfo) -> None:
        self.adapters.append((info.name, info.state.value))

    def adapter_load_failed(self, info: AdapterInfo) -> None:
        self.adapters.append((info.name, "load failed"))

    def adapter_removed(self, info: AdapterInfo) -> None:
        self.adapters.append((info.name, "removed"))

    def merge_ended(self, event: MergeEvent) -> None:
        self.merges.append(event)

    def stream_unread(self, limit: str) -> None:
        self.unread[limit] += 1

    def unread_changed(self, unread: int) -> None:
        self.unread_bytes.append(unread)

    def path_decided(self, path: LoraPath) -> None:
        self.paths.append(path)


class Running:
    """An engine on its thread, with a brake."""

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self.engine = engine
        self.recorder = Recorder()
        self.handle = AsyncEngine(engine, self.recorder, max_waiting=max_waiting)
        self.paused = threading.Event()
        real = engine.step

        def step() -> StepResult:
            if self.paused.is_set():
                time.sleep(0.001)
                return StepResult()
            return real()

        engine.step = step  # type: ignore[method-assign]

    async def collect(self, request: Request) -> list[RequestOutput]:
        return [output async for output in self.handle.generate(request)]

    async def tokens(self, request: Request) -> list[int]:
        outputs = await self.collect(request)
        assert [output.terminal for output in outputs] == [False] * (len(outputs) - 1) + [True]
        return [token for output in outputs for token in output.token_ids]

    async def settle(self) -> None:
        """Wait until the engine has nothing left to do and everybody has heard of it."""
        while not self.handle._engine_loop.idle or self.handle._streams:
            await asyncio.sleep(0.002)
        self.engine.check_integrity()
        assert all(info.running_requests == 0 for info in self.handle.list_adapters())


Start = Callable[..., Any]


@pytest.fixture
def store(llama_store: Path, tmp_path: Path) -> Path:
    return copy_of(llama_store, tmp_path / "store", "lora", "prefix", "prompt")


@pytest.fixture
def start(llama: Path, store: Path) -> Start:
    @asynccontextmanager
    async def running(*, max_waiting: int = 100, **settings: object) -> AsyncIterator[Running]:
        running = Running(make_engine(llama, store, **settings), max_waiting)
        running.handle.start()
        try:
            yield running
        finally:
            running.paused.clear()
            await running.handle.drain(10.0)
            books = running.recorder
            assert books.submitted == books.finished, "a request began and never ended, or ended twice"

    return running


@pytest.fixture
def expected(llama: Path, store: Path) -> dict[str | None, list[int]]:
    """What each adapter answers, from an engine without a thread."""
    names = [None, "lora", "prefix", "prompt"]
    engine = make_engine(llama, store)
    return dict(zip(names, run_greedy(engine, [greedy(str(n), PROMPT, n, 10) for n in names]), strict=True))


async def test_what_was_passed_over_is_counted_once(llama: Path, llama_store: Path, tmp_path: Path) -> None:
    store = copy_of(llama_store, tmp_path / "few", "lora", "prefix", "prompt")
    (store / "broken").mkdir()
    (store / "not a name").mkdir()
    metrics = Metrics()
    handle = AsyncEngine(make_engine(llama, store, max_adapters=2), metrics, max_waiting=1)
    handle.start()
    try:
        for _ in range(3):
            await asyncio.sleep(0.05)
        states = {labels["state"]: value for labels, value in samples(metrics, "polygraft_adapters")}
        assert states == {"LOADING": 0, "READY": 2, "FAILED": 3, "UNLOADING": 0}
        loads = {
            labels["result"]: value for labels, value in samples(metrics, "polygraft_adapter_loads_total")
        }
        assert loads == {"ok": 2, "failed": 3}
    finally:
        await handle.drain(1.0)


def samples(metrics: Metrics, name: str) -> list[tuple[dict[str, str], float]]:
    return [
        (sample.labels, sample.value)
        for metric in metrics.registry.collect()
        for sample in metric.samples
        if sample.name == name
    ]


async def test_many_streams_at_once_each_with_its_own_answer(
    start: Start, expected: dict[str | None, list[int]]
) -> None:
    async with start(max_num_seqs=7) as running:
        names = list(expected) * 6
        answers = await asyncio.gather(
            *(running.tokens(greedy(f"r{at}", PROMPT, name, 10)) for at, name in enumerate(names))
        )
        assert answers == [expected[name] for name in names]
        await running.settle()
        books = running.recorder
        assert books.submitted == {("", ""): 6, ("lora", "lora"): 6, ("prefix", "prefix_tuning"): 6,
                                   ("prompt", "prompt_tuning"): 6}  # fmt: skip
        assert books.tokens == {"": 60, "lora": 60, "prefix": 60, "prompt": 60}
        assert books.first_tokens == 24
        assert max(held.running for held in books.held) <= 7
        shared = max(len(stats.adapters) + stats.base_rows for stats in books.steps)
        assert shared >= 3


@pytest.mark.parametrize("after", [1, 4])
async def test_closing_a_stream_early_frees_what_it_held(
    start: Start, after: int, expected: dict[str | None, list[int]]
) -> None:
    async with start() as running:
        other = asyncio.create_task(running.tokens(greedy("other", PROMPT, "lora", 10)))
        stream = running.handle.generate(greedy("r", PROMPT, "prefix", 200))
        for _ in range(after):
            await anext(stream)
        await stream.aclose()
        await running.settle()
        assert await other == expected["lora"]
        [cancelled] = [end for end in running.recorder.ends if end.reason is FinishReason.CANCELLED]
        assert cancelled.usage.completion_tokens < 200


async def test_cancelling_the_task_that_reads_frees_it_as_well(start: Start) -> None:
    async with start() as running:
        running.paused.set()
        task = asyncio.create_task(running.collect(greedy("r", PROMPT, "lora", 100)))
        while "r" not in running.handle._streams:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while running.handle._streams:
            await asyncio.sleep(0.001)
        assert [end.reason for end in running.recorder.ends] == [FinishReason.CANCELLED]
        assert running.handle.get_adapter("lora").running_requests == 0
        held = running.recorder.held[-1]
        assert (held.running, held.kv_blocks_used) == (0, running.engine.scheduler.pool.used)


async def test_a_stream_that_is_never_read_never_begins(start: Start) -> None:
    async with start() as running:
        stream = running.handle.generate(greedy("r", PROMPT, "lora", 5))
        await stream.aclose()
        assert not running.recorder.submitted
        assert running.handle.get_adapter("lora").running_requests == 0


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (greedy("r", PROMPT, "nobody", 3), AdapterNotFound),
        (greedy("r", [], "lora", 3), InvalidRequest),
        (greedy("r", PROMPT, "lora", 3000), InvalidRequest),
    ],
)
async def test_a_refused_request_is_refused_before_it_is_queued(
    start: Start, bad: Request, error: type[Exception]
) -> None:
    async with start() as running:
        with pytest.raises(error):
            await anext(running.handle.generate(bad))
        assert not running.recorder.submitted
        assert not running.handle._streams
        assert running.handle.get_adapter("lora").running_requests == 0


async def test_an_id_that_is_running_already(start: Start) -> None:
    async with start() as running:
        running.paused.set()
        first = asyncio.create_task(running.tokens(greedy("r", PROMPT, "lora", 3)))
        while not running.handle._streams:
            await asyncio.sleep(0)
        with pytest.raises(InvalidRequest, match="'r' is running already"):
            await anext(running.handle.generate(greedy("r", PROMPT, "lora", 3)))
        running.paused.clear()
        assert len(await first) == 3
        assert len(await running.tokens(greedy("r", PROMPT, "lora", 3))) == 3


async def test_a_full_queue(start: Start) -> None:
    async with start(max_waiting=2) as running:
        running.paused.set()
        tasks = [asyncio.create_task(running.tokens(greedy(f"r{i}", PROMPT, None, 3))) for i in range(2)]
        while len(running.handle._streams) < 2:
            await asyncio.sleep(0)
        with pytest.raises(ResourceExhausted, match="2 requests are waiting, the limit is 2") as caught:
            await anext(running.handle.generate(greedy("more", PROMPT, "lora", 3)))
        assert caught.value.retry_after > 0
        assert running.handle.get_adapter("lora").running_requests == 0
        running.paused.clear()
        await asyncio.gather(*tasks)
        assert len(await running.tokens(greedy("more", PROMPT, "lora", 3))) == 3


async def test_an_error_ends_one_stream_and_no_other(
    start: Start, expected: dict[str | None, list[int]]
) -> None:
    async with start() as running:
        poison(running.engine, "lora")
        good = [asyncio.create_task(running.tokens(greedy(str(n), PROMPT, n, 10))) for n in (None, "prompt")]
        with pytest.raises(PolygraftError, match="not finite"):
            await running.collect(greedy("bad", PROMPT, "lora", 10))
        assert [await task for task in good] == [expected[None], expected["prompt"]]
        await running.settle()
        assert sum(isinstance(end, PolygraftError) for end in running.recorder.ends) == 1


# ---- adapters --------------------------------------------------------------------------------------------


async def test_loading_reloading_and_unloading(start: Start, store: Path) -> None:
    async with start() as running:
        handle = running.handle
        assert running.recorder.adapters == [("lora", "READY"), ("prefix", "READY"), ("prompt", "READY")]
        running.recorder.adapters.clear()
        shutil.copytree(store / "lora", store / "deep" / "one")
        first = await handle.load_adapter("new", "deep/one")
        assert (first.name, first.source, first.state) == ("new", "deep/one", AdapterState.READY)
        assert await handle.load_adapter("new", "deep/one") == first == handle.get_adapter("new")
        assert await handle.reload_adapter("new") == first
        before = await running.tokens(greedy("r", PROMPT, "new", 8))
        strengthen(store / "deep" / "one")
        with pytest.raises(AdapterExists):
            await handle.load_adapter("new", "deep/one")
        second = await handle.reload_adapter("new")
        assert second.generation > first.generation
        assert await running.tokens(greedy("r", PROMPT, "new", 8)) != before
        await handle.unload_adapter("new")
        with pytest.raises(AdapterNotFound):
            handle.get_adapter("new")
        assert [info.name for info in handle.list_adapters()] == ["lora", "prefix", "prompt"]
        while ("new", "removed") not in running.recorder.adapters:
            await asyncio.sleep(0.001)
        states = [("new", state) for state in ("READY", "READY", "UNLOADING", "removed")]
        assert running.recorder.adapters == states


async def test_loads_of_the_same_at_once_are_one(start: Start, store: Path) -> None:
    shutil.copytree(store / "lora", store / "a" / "b")
    async with start() as running:
        infos = await asyncio.gather(*(running.handle.load_adapter("new", "a/b") for _ in range(5)))
        assert len({info.generation for info in infos}) == 1
        # The observer is told in the next hand-over, which may come after the callers' answers.
        async with asyncio.timeout(10):
            while ("new", "READY") not in running.recorder.adapters:
                await asyncio.sleep(0.001)
        await running.tokens(greedy("after", PROMPT, "new", 2))
        assert running.recorder.adapters.count(("new", "READY")) == 1


@pytest.mark.parametrize("name", ["../lora", "a@b", "", "x" * 200, "a/b", ".a"])
async def test_names_that_cant_be(start: Start, name: str) -> None:
    async with start() as running:
        with pytest.raises(InvalidRequest, match="name: must match"):
            await running.handle.load_adapter(name, "lora")


@pytest.mark.parametrize("source", ["../store/lora", "/etc", "lora/../../x", "a\0b", "."])
async def test_sources_that_cant_be(start: Start, source: str) -> None:
    async with start() as running:
        with pytest.raises(InvalidRequest, match="source: must be a folder below the store"):
            await running.handle.load_adapter("new", source)
        with pytest.raises(AdapterInvalid, match="no such folder in the store: new"):
            await running.handle.load_adapter("new")
        with pytest.raises(AdapterNotFound):
            await running.handle.reload_adapter("new")


async def test_a_broken_folder_while_requests_run(
    start: Start, store: Path, expected: dict[str | None, list[int]]
) -> None:
    shutil.copytree(store / "lora", store / "bad")
    change(store / "bad", use_qalora=True)
    async with start() as running:
        stream = running.handle.generate(greedy("r", PROMPT, "lora", 10))
        tokens = list((await anext(stream)).token_ids)
        with pytest.raises(AdapterUnavailable, match="use_qalora=True isn't served"):
            await anext(running.handle.generate(greedy("x", PROMPT, "bad", 10)))
        with pytest.raises(AdapterInvalid, match="use_qalora=True isn't served"):
            await running.handle.load_adapter("bad")
        async for output in stream:
            tokens += output.token_ids
        assert tokens == expected["lora"]
        assert running.handle.get_adapter("bad").state is AdapterState.FAILED


async def test_an_unload_waits_or_refuses(start: Start, expected: dict[str | None, list[int]]) -> None:
    async with start() as running:
        running.paused.set()
        task = asyncio.create_task(running.tokens(greedy("r", PROMPT, "lora", 10)))
        while not running.handle._streams:
            await asyncio.sleep(0)
        with pytest.raises(AdapterUnavailable, match="in use by 1 running requests"):
            await running.handle.unload_adapter("lora", wait=False)
        unload = asyncio.create_task(running.handle.unload_adapter("lora"))
        while running.handle.get_adapter("lora").state is AdapterState.READY:
            await asyncio.sleep(0.001)
        with pytest.raises(AdapterUnavailable, match="being unloaded"):
            await anext(running.handle.generate(greedy("late", PROMPT, "lora", 3)))
        assert not unload.done()
        running.paused.clear()
        assert await task == expected["lora"]
        assert (await unload).name == "lora"


async def test_a_caller_that_gives_up_doesnt_stop_a_load(start: Start, store: Path) -> None:
    shutil.copytree(store / "lora", store / "a" / "b")
    async with start() as running:
        running.paused.set()
        stream = asyncio.create_task(running.tokens(greedy("r", PROMPT, None, 3)))
        load = asyncio.create_task(running.handle.load_adapter("new", "a/b"))
        while "new" not in {info.name for info in running.handle.list_adapters()}:
            await asyncio.sleep(0.001)
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
        running.paused.clear()
        await stream
        while running.handle.get_adapter("new").state is not AdapterState.READY:
            await asyncio.sleep(0.001)


async def test_an_error_that_nobody_waits_for_any_more_is_not_logged_as_lost(start: Start) -> None:
    lost: list[dict[str, Any]] = []
    async with start() as running:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: lost.append(context))
        unload = asyncio.create_task(running.handle.unload_adapter("nobody"))
        await asyncio.sleep(0)
        unload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await unload
        del unload
        with pytest.raises(AdapterNotFound):
            await running.handle.unload_adapter("nobody")
        gc.collect()
        await asyncio.sleep(0)
    assert not lost


async def test_nearest_tokens(start: Start) -> None:
    async with start() as running:
        near = await running.handle.nearest_tokens("prompt", 3)
        assert [len(row) for row in near] == [3] * 6
        for row in near:
            assert [t.similarity for t in row] == sorted((t.similarity for t in row), reverse=True)
            assert [t.text for t in row] == [await running.handle.detokenize([t.token_id]) for t in row]
        assert await running.handle.nearest_tokens("prompt", 0) == []
        assert await running.handle.nearest_tokens("lora", 3) == []
        assert len((await running.handle.nearest_tokens("prompt", 10**6))[0]) == 288
        with pytest.raises(AdapterNotFound):
            await running.handle.nearest_tokens("nobody", 3)


async def test_tokenizing_is_what_generating_does(start: Start) -> None:
    async with start() as running:
        ids = await running.handle.tokenize("naïve")
        assert await running.handle.detokenize(ids) == "naïve"
        chat = Chat((ChatMessage("user", "hi"),))
        assert await running.handle.detokenize(await running.handle.tokenize(chat)) == "[user]hi\n[assistant]"


# ---- ends ------------------------------------------------------------------------------------------------


async def test_when_the_engine_fails_everybody_is_told(
    llama: Path, store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    running = Running(make_engine(llama, store), 100)
    handle = running.handle
    handle.start()
    running.paused.set()
    streams = [
        asyncio.create_task(running.collect(greedy(str(n), PROMPT, n, 10))) for n in (None, "lora", "prompt")
    ]
    abandoned = handle.generate(greedy("abandoned", PROMPT, None, 10))
    reading = asyncio.ensure_future(anext(abandoned))
    while len(handle._streams) < 4:
        await asyncio.sleep(0)
    unload = asyncio.create_task(handle.unload_adapter("lora"))
    failed = asyncio.create_task(handle.wait_failed())
    while handle.get_adapter("lora").state is AdapterState.READY:
        await asyncio.sleep(0.001)
    assert handle.failure is None
    assert not failed.done()

    def broken(batch: object) -> None:
        raise RuntimeError("the model is on fire")

    monkeypatch.setattr(running.engine.runner, "run", broken)
    running.paused.clear()
    for waiting in (*streams, reading, unload):
        with pytest.raises(EngineDead):
            await waiting
    await failed
    assert str(handle.failure) == "the model is on fire"
    assert "the engine has failed" in caplog.text
    for call in (
        lambda: anext(handle.generate(greedy("late", PROMPT, None, 3))),
        lambda: handle.load_adapter("new", "lora"),
        lambda: handle.unload_adapter("prefix"),
        lambda: handle.nearest_tokens("prompt", 2),
    ):
        with pytest.raises(EngineDead):
            await call()
    assert running.recorder.submitted == running.recorder.finished
    assert len(running.recorder.ends) == 4
    assert all(isinstance(end, EngineDead) for end in running.recorder.ends)
    assert await handle.drain(10.0) == 0


async def test_draining_lets_the_running_ones_finish(
    start: Start, expected: dict[str | None, list[int]]
) -> None:
    async with start(max_num_seqs=2) as running:
        running.paused.set()
        names = [None, "lora", "prefix", "prompt"]
        tasks = [asyncio.create_task(running.tokens(greedy(str(n), PROMPT, n, 10))) for n in names]
        while len(running.handle._streams) < 4:
            await asyncio.sleep(0)
        drain = asyncio.create_task(running.handle.drain(60.0))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await anext(running.handle.generate(greedy("late", PROMPT, None, 3)))
        with pytest.raises(Draining):
            await running.handle.load_adapter("new", "lora")
        running.paused.clear()
        assert [await task for task in tasks] == [expected[name] for name in names]
        assert await drain == 0
        assert running.handle._ended is not None
        assert running.handle._ended.done()


async def test_draining_aborts_what_doesnt_end_in_time(start: Start) -> None:
    async with start(max_num_seqs=1) as running:
        running.paused.set()
        tasks = [asyncio.create_task(running.collect(greedy(f"r{i}", PROMPT, "lora", 100))) for i in range(3)]
        while len(running.handle._streams) < 3:
            await asyncio.sleep(0)
        assert await running.handle.drain(0.01) == 3
        for task in tasks:
            outputs = await task
            assert outputs[-1].finished is not None
            assert outputs[-1].finished.reason is FinishReason.CANCELLED
        assert running.handle._ended is not None
        assert running.handle._ended.done()
        running.engine.check_integrity()
        assert not running.engine.scheduler.has_work


async def test_a_command_that_waits_is_answered_when_the_engine_stops(start: Start, store: Path) -> None:
    shutil.copytree(store / "lora", store / "a" / "b")
    async with start() as running:
        running.paused.set()
        load = asyncio.create_task(running.handle.load_adapter("new", "a/b"))
        while "new" not in {info.name for info in running.handle.list_adapters()}:
            await asyncio.sleep(0.001)
        assert await running.handle.drain(10.0) == 0
        with pytest.raises(Draining):
            await load
        with pytest.raises(Draining):
            await running.handle.unload_adapter("lora")


async def test_draining_twice_is_the_same(start: Start) -> None:
    async with start() as running:
        assert await running.handle.drain(1.0) == 0
        assert await running.handle.drain(1.0) == 0


async def test_a_stop_between_two_looks_at_the_inbox_isnt_lost(llama: Path, store: Path) -> None:
    running = Running(make_engine(llama), 100)
    handle = running.handle

    class Wake(threading.Event):
        """The stop arrives just before the engine's thread clears the event."""

        def clear(self) -> None:
            handle._engine_loop._stopping = True
            self.set()
            super().clear()

    handle._engine_loop._wake = Wake()
    handle.start()
    assert handle._ended is not None
    await asyncio.wait_for(asyncio.wrap_future(handle._ended), 10.0)
