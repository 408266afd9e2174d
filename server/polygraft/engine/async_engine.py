"""Runs an engine on a thread of its own beside an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from polygraft.adapters.info import AdapterInfo, AdapterState, NearToken
from polygraft.adapters.names import check_name
from polygraft.adapters.nearest import nearest_tokens
from polygraft.adapters.primitives import SoftPrompt
from polygraft.adapters.stack import Stack
from polygraft.engine.adapter_manager import AdapterChange
from polygraft.engine.background import Job
from polygraft.engine.engine import Engine
from polygraft.engine.engine_thread import EngineThread
from polygraft.engine.handle import ModelInfo, Observer
from polygraft.engine.prompts import Prompts
from polygraft.engine.request import AdapterRef, Chat, Request, RequestOutput, ScoreRequest
from polygraft.engine.scoring import ScoreJob
from polygraft.engine.sequence import Generation
from polygraft.engine.step_result import StepResult
from polygraft.errors import Draining, EngineDead, InvalidRequest, PolygraftError, ResourceExhausted

log = logging.getLogger(__name__)
T = TypeVar("T")
P = TypeVar("P", Generation, ScoreJob)

REST_SECONDS = 1.0
"""How long nothing may have happened before jobs run that nobody waits for."""
_LONG_PROMPT = 16_384
"""Characters: tokenizing so many takes some milliseconds."""


@dataclass(slots=True)
class _Stream:
    """One request as the event loop sees it. `queue` is None once nobody listens any more."""

    queue: asyncio.Queue[RequestOutput] | None
    adapter: str
    kind: str
    last_tokens: float | None = None


def _release(prepared: asyncio.Future[Generation] | asyncio.Future[ScoreJob]) -> None:
    """Let go of what a request holds that nobody waits for any more."""
    if not prepared.cancelled() and prepared.exception() is None:
        prepared.result().stack.release()


class AsyncEngine:
    """`EngineHandle` over an engine on a thread of this process.

    The thread alone touches the engine; calls reach it through an inbox that it empties between steps, and
    each step's outputs come back to the loop in one hand-over.

    Args:
        engine: loaded; this object owns it from here on.
        max_waiting: most requests that may be on their way and not yet running.
        thread: the one that the engine was loaded on; None starts one.
    """

    def __init__(
        self, engine: Engine, observer: Observer, *, max_waiting: int, thread: EngineThread | None = None
    ) -> None:
        self._engine = engine
        self._observer = observer
        self._max_waiting = max_waiting
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._draining = False
        self._failure: Exception | None = None
        self._failed = asyncio.Event()
        self._streams: dict[str, _Stream] = {}
        self._commands: set[Future[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop = asyncio.get_running_loop()
        self._thread = thread or EngineThread()
        self._ended: Future[None] | None = None

    def start(self) -> None:
        """Start stepping."""
        for info in self.list_adapters():
            if info.state is AdapterState.FAILED:
                self._observer.adapter_load_failed(info)
            self._observer.adapter_changed(info)
        self._observer.occupancy_changed(self._engine.occupancy)
        self._ended = self._thread.submit(self._run)

    # ---- on the event loop's thread ---------------------------------------------------------------------

    @property
    def model(self) -> ModelInfo:
        """The base model as it is served."""
        return self._engine.model

    @property
    def failure(self) -> Exception | None:
        """What killed the engine, or None while it works."""
        return self._failure

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """See `EngineHandle.generate`."""
        self._check_room(request.id)
        if isinstance(request.prompt, str) and len(request.prompt) > _LONG_PROMPT:
            generation = await self._prepare_aside(lambda: self._engine.prepare(request))
        else:
            generation = self._engine.prepare(request)
        outputs = self._follow(request.id, generation.stack, lambda: self._engine.add(generation))
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                yield output

    async def score(self, request: ScoreRequest) -> RequestOutput:
        """See `EngineHandle.score`."""
        self._check_room(request.id)
        # The prompt is tokenized with each of the continuations.
        job = await self._prepare_aside(lambda: self._engine.prepare_score(request))
        outputs = self._follow(request.id, job.stack, lambda: self._engine.add_score(job))
        async with contextlib.aclosing(outputs):
            return await anext(outputs)

    def _check_room(self, request_id: str) -> None:
        self._check_open()
        if request_id in self._streams:
            raise InvalidRequest("request_id", f"{request_id!r} is running already")
        waiting = len(self._streams) - len(self._engine.scheduler.running)
        if waiting >= self._max_waiting:
            raise ResourceExhausted(f"{waiting} requests are waiting, the limit is {self._max_waiting}")

    async def _prepare_aside(self, prepare: Callable[[], P]) -> P:
        """Prepare on another thread what would hold up everybody's stream on this one meanwhile."""
        prepared = asyncio.ensure_future(asyncio.to_thread(prepare))
        try:
            result = await asyncio.shield(prepared)
            # Draining may have begun meanwhile, and the engine's thread have ended.
            self._check_open()
        except (asyncio.CancelledError, Draining, EngineDead):
            # The thread may go on, and nobody else would release the adapter that it pins.
            prepared.add_done_callback(_release)
            raise
        return result

    async def _follow(
        self, request_id: str, stack: Stack, add: Callable[[], None]
    ) -> AsyncGenerator[RequestOutput, None]:
        """Queue what is prepared and hand on what comes of it; closing this aborts it."""
        queue: asyncio.Queue[RequestOutput] = asyncio.Queue()
        stream = _Stream(queue, stack.label, stack.kind)
        self._streams[request_id] = stream
        self._idle.clear()
        self._observer.request_submitted(stream.adapter, stream.kind)
        self._post(add)
        terminal = False
        try:
            while not terminal:
                output = await queue.get()
                terminal = output.terminal
                if output.error is not None:
                    raise output.error
                yield output
        finally:
            stream.queue = None
            if not terminal:
                self._abort(request_id)

    def _abort(self, request_id: str) -> None:
        def abort() -> None:
            outputs = self._engine.abort(request_id)
            self._hand_over(StepResult(outputs, occupancy=self._engine.occupancy))

        self._post(abort)

    def tokenize(self, prompt: str | Chat, adapters: Sequence[AdapterRef] = ()) -> tuple[int, ...]:
        """See `EngineHandle.tokenize`."""
        return tuple(self._prompts_of(adapters).token_ids(prompt))

    def _prompts_of(self, adapters: Sequence[AdapterRef]) -> Prompts:
        stack = self._engine.intake.resolve(adapters)
        try:
            return self._engine.prompts.of(stack)
        finally:
            stack.release()

    def detokenize(self, token_ids: Sequence[int], adapters: Sequence[AdapterRef] = ()) -> str:
        """See `EngineHandle.detokenize`."""
        return self._prompts_of(adapters).decode(token_ids)

    async def load_adapter(self, name: str, source: str = "") -> AdapterInfo:
        """See `EngineHandle.load_adapter`."""
        return await self._load(name, source or name, reload=False)

    async def reload_adapter(self, name: str) -> AdapterInfo:
        """See `EngineHandle.reload_adapter`."""
        return await self._load(name, self.get_adapter(name).source, reload=True)

    async def _load(self, name: str, source: str, *, reload: bool) -> AdapterInfo:
        self._check_open()
        check_name(name)
        # Reading blocks on the disk and holds no core; what follows runs between steps.
        folder = await asyncio.to_thread(self._engine.adapters.store.read, name, source)
        return await self._command(
            lambda done: self._engine.adapters.load(name, source, folder, done, reload=reload)
        )

    async def unload_adapter(self, name: str, *, wait: bool = True) -> AdapterInfo:
        """See `EngineHandle.unload_adapter`."""
        return await self._command(lambda done: self._engine.adapters.unload(name, done, wait=wait))

    async def update_adapter(self, name: str, *, merged: bool) -> AdapterInfo:
        """See `EngineHandle.update_adapter`."""
        self._check_open()
        return await self._command(lambda done: self._engine.merging.update(name, merged, done))

    async def _command(self, command: Callable[[Future[T]], None]) -> T:
        if self._failure is not None:
            raise EngineDead(str(self._failure))
        if self._stopping:
            raise Draining("the server is shutting down")
        done: Future[T] = Future()
        self._commands.add(done)
        done.add_done_callback(self._commands.discard)
        self._post(lambda: command(done))
        # Shielded: a caller that gives up must not cancel what the engine is doing.
        return await asyncio.shield(asyncio.wrap_future(done))

    def get_adapter(self, name: str) -> AdapterInfo:
        """See `EngineHandle.get_adapter`."""
        return self._engine.adapters.registry.get(name)

    def list_adapters(self) -> list[AdapterInfo]:
        """See `EngineHandle.list_adapters`."""
        return self._engine.adapters.registry.list()

    async def nearest_tokens(self, name: str, count: int) -> list[list[NearToken]]:
        """See `EngineHandle.nearest_tokens`."""
        prompt = self._engine.adapters.registry.compiled(name).prefix
        if not isinstance(prompt, SoftPrompt) or count == 0:
            return []
        table = self._engine.base.model.get_input_embeddings().weight

        def job(done: Future[list[list[NearToken]]]) -> Job:
            try:
                done.set_result(
                    (yield from nearest_tokens(prompt, table, count, lambda token: self.detokenize([token])))
                )
            except Exception as error:  # noqa: BLE001 - passed on to the caller
                done.set_exception(error)

        return await self._command(lambda done: self._engine.background.add(job(done)))

    async def wait_failed(self) -> None:
        """Return when the engine has died."""
        await self._failed.wait()

    async def drain(self, timeout: float) -> int:
        """See `EngineHandle.drain`."""
        self._draining = True
        aborted = 0
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            aborted = len(self._streams)
            for request_id in list(self._streams):
                self._abort(request_id)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), 10.0)
        self._stopping = True
        self._wake.set()
        if self._ended is not None:
            await asyncio.wrap_future(self._ended)
        self._end_commands(Draining("the server is shutting down"))
        return aborted

    def _end_commands(self, error: PolygraftError) -> None:
        """Answer those that wait for a command; the engine's thread has ended and won't."""
        for done in list(self._commands):
            done.set_exception(error)

    def _check_open(self) -> None:
        if self._failure is not None:
            raise EngineDead(str(self._failure))
        if self._draining:
            raise Draining("the server is shutting down")

    def _post(self, command: Callable[[], None]) -> None:
        self._inbox.append(command)
        self._wake.set()

    def _deliver(self, result: StepResult) -> None:
        now = time.monotonic()
        for output in result.outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            if output.token_ids:
                interval = None if stream.last_tokens is None else now - stream.last_tokens
                self._observer.tokens_generated(
                    stream.adapter, stream.kind, output.path.value, len(output.token_ids), interval
                )
                stream.last_tokens = now
            if output.terminal:
                del self._streams[output.request_id]
                self._observer.request_finished(stream.adapter, stream.kind, output.finished, output.error)
            if stream.queue is not None:
                stream.queue.put_nowait(output)
        if result.stats is not None:
            self._observer.step_finished(result.stats)
        if result.occupancy is not None:
            self._observer.occupancy_changed(result.occupancy)
        for change, info in result.adapter_events:
            match change:
                case AdapterChange.CHANGED:
                    self._observer.adapter_changed(info)
                case AdapterChange.REMOVED:
                    self._observer.adapter_removed(info)
                case AdapterChange.LOAD_FAILED:
                    self._observer.adapter_load_failed(info)
        for event in result.merge_events:
            self._observer.merge_ended(event)
        for path in result.path_decisions:
            self._observer.path_decided(path)
        if not self._streams:
            self._idle.set()

    def _fail(self, error: Exception) -> None:
        self._failure = error
        dead = EngineDead("the engine has failed")
        outputs = [RequestOutput(request_id, error=dead) for request_id in self._streams]
        self._deliver(StepResult(outputs=outputs))
        self._end_commands(dead)
        self._failed.set()

    # ---- on the engine's thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                # Cleared before anything is read, so that what comes in between wakes it again.
                self._wake.clear()
                if self._stopping:
                    return
                while self._inbox:
                    self._inbox.popleft()()
                if self._engine.has_work:
                    self._hand_over(self._engine.step())
                else:
                    self._hand_over(self._engine.take_news(StepResult()))
                    rest = REST_SECONDS if self._engine.background.resting else None
                    if not self._wake.wait(rest):
                        self._engine.background.wake_resting()
        except Exception as error:
            # The engine's state is unknown: nobody may go on with it.
            log.critical("the engine has failed", exc_info=error)
            self._call(self._fail, error)

    def _hand_over(self, result: StepResult) -> None:
        if result.tells_anything:
            self._call(self._deliver, result)

    def _call(self, function: Callable[[T], None], argument: T) -> None:
        # The loop may be closed already when a server is torn down.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, argument)
