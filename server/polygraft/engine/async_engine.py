"""Runs an engine on a thread of its own beside an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from polygraft.adapters.files.folder import AdapterFolder
from polygraft.adapters.nearest import nearest_tokens
from polygraft.adapters.stack import Stack
from polygraft.core.names import check_name
from polygraft.core.output import RequestOutput
from polygraft.core.primitives import SoftPrompt
from polygraft.engine.client import ModelInfo, Observer
from polygraft.engine.commands import Commands
from polygraft.engine.engine import Engine
from polygraft.engine.engine_loop import EngineLoop
from polygraft.engine.engine_thread import EngineThread
from polygraft.engine.loading.load_memory import LoadQueue, Ticket
from polygraft.engine.requests.preparation import Preparation
from polygraft.engine.residency.background import Job
from polygraft.engine.step_result import StepResult
from polygraft.engine.streams import Streams
from polygraft.engine.watchdog import Watchdog
from polygraft.errors import Draining, EngineDead, InvalidRequest, ResourceExhausted
from polygraft_types.adapters import AdapterInfo, AdapterState, NearestToken
from polygraft_types.requests import AdapterRef, Chat, Request, ScoreRequest

log = logging.getLogger(__name__)
T = TypeVar("T")

_ABORT_SECONDS = 10.0
"""How long aborted requests may take to end."""


class AsyncEngine:
    """`EngineClient` over an engine on a thread of this process.

    The thread alone touches the engine; calls reach it through an inbox that it empties between steps, and
    each step's outputs come back to the loop in one hand-over. If an error or a hang ends the thread, or
    handing on outputs fails, every request and command ends with `EngineDead`.

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
        self._draining = False
        self._failure: BaseException | None = None
        self._failed = asyncio.Event()
        self._streams = Streams(observer, engine.config.max_unread_bytes, self._abort)
        self._preparation = Preparation(engine.intake, max_waiting)
        self._event_loop = asyncio.get_running_loop()
        self._thread = thread or EngineThread()
        self._engine_loop = EngineLoop(engine, self._hand_over)
        self._commands = Commands(self._engine_loop)
        self._watchdog = Watchdog(
            self._engine_loop,
            self._thread.thread,
            engine.config.step_timeout,
            lambda problem: self._call(self._fail, EngineDead(problem)),
        )
        self._loads = LoadQueue(engine.adapters.memory)
        self._stopped = False
        self._ended: Future[None] | None = None

    def start(self) -> None:
        """Start stepping."""
        self._engine.take_news(StepResult())  # drop news from loading, which the registry has already
        for info in self.list_adapters():
            if info.state is AdapterState.FAILED:
                self._observer.adapter_load_failed(info)
            self._observer.adapter_changed(info)
        self._observer.occupancy_changed(self._engine.occupancy)
        self._ended = self._thread.submit(self._engine_loop.run)
        self._ended.add_done_callback(self._note_end)
        self._watchdog.start()

    # ---- requests ---------------------------------------------------------------------------------------

    @property
    def model(self) -> ModelInfo:
        """The base model as it is served."""
        return self._engine.model

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """See `EngineClient.generate`."""
        self._check_room(request.id)
        generation = await self._preparation.generation(request)
        outputs = self._follow(request.id, generation.stack, lambda: self._engine.add(generation))
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                yield output

    async def score(self, request: ScoreRequest) -> RequestOutput:
        """See `EngineClient.score`."""
        self._check_room(request.id)
        job = await self._preparation.score(request)
        outputs = self._follow(request.id, job.stack, lambda: self._engine.add(job))
        async with contextlib.aclosing(outputs):
            return await anext(outputs)

    def _check_room(self, request_id: str) -> None:
        self._check_open()
        if request_id in self._streams or request_id in self._preparation:
            raise InvalidRequest("request_id", f"{request_id!r} is running already")
        waiting = len(self._streams) + len(self._preparation) - len(self._engine.scheduler.running)
        if waiting >= self._max_waiting:
            raise ResourceExhausted(f"{waiting} requests are waiting, the limit is {self._max_waiting}")

    async def _follow(
        self, request_id: str, stack: Stack, add: Callable[[], None]
    ) -> AsyncGenerator[RequestOutput, None]:
        """Queue what is prepared and hand on what comes of it; closing this aborts it."""
        try:
            # Draining may have begun, or the engine died, while the request was prepared.
            self._check_open()
            stream = self._streams.open(request_id, stack)
        except BaseException:
            stack.release()
            raise
        self._engine_loop.post(add)
        terminal = False
        try:
            while not terminal:
                output = await stream.take()
                terminal = output.terminal
                if output.error is not None:
                    raise output.error
                yield output
        finally:
            stream.close()
            if not terminal:
                self._abort(request_id)

    def _abort(self, request_id: str) -> None:
        def abort() -> None:
            outputs = self._engine.abort(request_id)
            self._hand_over(StepResult(outputs, occupancy=self._engine.occupancy))

        self._engine_loop.post(abort)

    async def tokenize(self, prompt: str | Chat, adapters: Sequence[AdapterRef] = ()) -> tuple[int, ...]:
        """See `EngineClient.tokenize`."""
        return await self._preparation.tokenize(prompt, adapters)

    def model_for(self, adapters: Sequence[AdapterRef]) -> ModelInfo:
        """See `EngineClient.model_for`."""
        prompts = self._engine.intake.prompts_of(adapters)
        return replace(
            self.model,
            vocabulary_size=prompts.vocabulary,
            eos_token_ids=prompts.eos_token_ids,
            has_chat_template=prompts.has_chat_template,
        )

    async def detokenize(self, token_ids: Sequence[int], adapters: Sequence[AdapterRef] = ()) -> str:
        """See `EngineClient.detokenize`."""
        return await self._preparation.detokenize(token_ids, adapters)

    # ---- adapters ---------------------------------------------------------------------------------------

    async def load_adapter(self, name: str, source: str = "") -> AdapterInfo:
        """See `EngineClient.load_adapter`."""
        return await self._load(name, source or name, reload=False)

    async def reload_adapter(self, name: str) -> AdapterInfo:
        """See `EngineClient.reload_adapter`."""
        return await self._load(name, self.get_adapter(name).source, reload=True)

    async def _load(self, name: str, source: str, *, reload: bool) -> AdapterInfo:
        self._check_open()
        check_name(name)
        adapters = self._engine.adapters
        size = await asyncio.to_thread(adapters.store.size, name, source)
        ticket = await self._loads.enter(size)
        try:
            self._check_open()
            # Reading blocks on the disk and holds no core; what follows runs between steps.
            folder = await asyncio.to_thread(adapters.store.read, name, source, size)
            command = self._loading(name, source, folder, ticket, reload=reload)
            del folder
            return await self._command(command)
        except asyncio.CancelledError:
            # A load that has begun goes on without its caller, and gives its room back at its end.
            if not ticket.handed_over:
                self._loads.leave(ticket)
            raise
        except BaseException:
            self._loads.leave(ticket)
            raise

    def _loading(
        self, name: str, source: str, folder: AdapterFolder, ticket: Ticket, *, reload: bool
    ) -> Callable[[Future[AdapterInfo]], None]:
        """The command that loads what has been read, and gives the room for it back."""
        ticket.handed_over = True

        def load(done: Future[AdapterInfo]) -> None:
            done.add_done_callback(lambda _: self._call(self._loads.leave, ticket))
            self._engine.adapters.load(name, source, folder, done, reload=reload)

        return load

    async def unload_adapter(self, name: str, *, wait: bool = True) -> AdapterInfo:
        """See `EngineClient.unload_adapter`."""
        return await self._command(lambda done: self._engine.adapters.unload(name, done, wait=wait))

    async def update_adapter(self, name: str, *, merged: bool) -> AdapterInfo:
        """See `EngineClient.update_adapter`."""
        self._check_open()
        return await self._command(lambda done: self._engine.merging.update(name, merged, done))

    async def _command(self, command: Callable[[Future[T]], None]) -> T:
        self._check_alive()
        if self._stopped:
            raise Draining("the server is shutting down")
        return await self._commands.run(command)

    def get_adapter(self, name: str) -> AdapterInfo:
        """See `EngineClient.get_adapter`."""
        return self._engine.adapters.registry.get(name)

    def list_adapters(self) -> list[AdapterInfo]:
        """See `EngineClient.list_adapters`."""
        return self._engine.adapters.registry.list()

    async def nearest_tokens(self, name: str, count: int) -> list[list[NearestToken]]:
        """See `EngineClient.nearest_tokens`."""
        prompt = self._engine.adapters.registry.compiled(name).prefix
        if not isinstance(prompt, SoftPrompt) or count == 0:
            return []
        table = self._engine.base.model.get_input_embeddings().weight

        def text(token: int) -> str:
            return self._engine.prompts.base.decode([token])

        def job(done: Future[list[list[NearestToken]]]) -> Job:
            try:
                done.set_result((yield from nearest_tokens(prompt, table, count, text)))
            except Exception as error:  # noqa: BLE001 - passed on to the caller
                done.set_exception(error)

        return await self._command(lambda done: self._engine.background.add(job(done)))

    # ---- the end ----------------------------------------------------------------------------------------

    @property
    def failure(self) -> BaseException | None:
        """What killed the engine, or None while it runs."""
        return self._failure

    async def wait_failed(self) -> None:
        """Return when the engine has died."""
        await self._failed.wait()

    async def drain(self, timeout: float) -> int:
        """See `EngineClient.drain`."""
        self._draining = True
        aborted = 0
        if not await self._until_idle(timeout):
            aborted = len(self._streams)
            for request_id in self._streams:
                self._abort(request_id)
            await self._until_idle(_ABORT_SECONDS)
        self._stopped = True
        self._engine_loop.stop()
        if self._ended is not None and self._failure is None:
            await self._first(asyncio.wrap_future(self._ended), None)
        self._watchdog.stop()
        self._commands.end(Draining("the server is shutting down"))
        return aborted

    async def _until_idle(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds until no request is left; returns whether none is."""
        await self._first(asyncio.ensure_future(self._streams.idle.wait()), timeout)
        return self._streams.idle.is_set()

    async def _first(self, wait: asyncio.Future[Any], timeout: float | None) -> None:
        """Return when `wait` has ended, the engine has died, or `timeout` seconds have passed."""
        failed = asyncio.ensure_future(self._failed.wait())
        try:
            await asyncio.wait((wait, failed), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            failed.cancel()
            wait.cancel()

    def _check_open(self) -> None:
        self._check_alive()
        if self._draining:
            raise Draining("the server is shutting down")

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineDead(str(self._failure))

    def _deliver(self, result: StepResult) -> None:
        if self._failure is not None:
            return  # all have been answered; the thread is coming out of a hang
        try:
            self._streams.deliver(result)
        except BaseException as error:  # noqa: BLE001 - an output may be lost, and nobody may wait for it
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """End everything: the engine's state is unknown, so it must not be used any further."""
        if self._failure is not None:
            return
        log.critical("the engine has failed", exc_info=error)
        self._failure = error
        self._engine_loop.stop()
        self._watchdog.stop()
        dead = EngineDead("the engine has failed")
        self._streams.fail(dead)
        self._commands.end(dead)
        self._failed.set()

    # ---- on the engine's thread -------------------------------------------------------------------------

    def _note_end(self, ended: Future[None]) -> None:
        error = ended.exception()
        if error is not None:
            self._call(self._fail, error)

    def _hand_over(self, result: StepResult) -> None:
        self._call(self._deliver, result)

    def _call(self, function: Callable[[T], None], argument: T) -> None:
        # The loop may be closed already when a server is torn down.
        with contextlib.suppress(RuntimeError):
            self._event_loop.call_soon_threadsafe(function, argument)
