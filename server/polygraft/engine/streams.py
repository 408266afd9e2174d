"""From the engine's steps to whoever reads a request's answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator

from polygraft.adapters.stack import Stack
from polygraft.engine.adapter_manager import AdapterChange
from polygraft.engine.handle import Observer
from polygraft.engine.request import RequestOutput
from polygraft.engine.step_result import StepResult
from polygraft.errors import PolygraftError

log = logging.getLogger(__name__)


class Stream:
    """One request as the event loop sees it.

    Args:
        adapter, kind: as the observer is told.
    """

    def __init__(self, request_id: str, adapter: str, kind: str) -> None:
        self.id = request_id
        self.adapter = adapter
        self.kind = kind
        self.last_tokens: float | None = None
        self._outputs: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self._read = True

    def put(self, output: RequestOutput) -> None:
        """Hand an output to whoever reads, if anybody still does."""
        if self._read:
            self._outputs.put_nowait(output)

    async def take(self) -> RequestOutput:
        """The next output, when it is there."""
        return await self._outputs.get()

    def close(self) -> None:
        """Nobody reads any more."""
        self._read = False
        self._outputs = asyncio.Queue()


class Streams:
    """The requests that the engine has and hasn't ended. Belongs to the event loop's thread.

    Every one of them gets exactly one output that is terminal: the engine's own, or the error of `fail`.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._open: dict[str, Stream] = {}
        self.idle = asyncio.Event()
        """Set while there is none."""
        self.idle.set()

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[str]:
        """Their ids."""
        return iter(list(self._open))

    def __contains__(self, request_id: object) -> bool:
        """Whether a request of this id is among them."""
        return request_id in self._open

    def open(self, request_id: str, stack: Stack) -> Stream:
        """Begin one, before the engine has heard of it."""
        stream = self._open[request_id] = Stream(request_id, stack.label, stack.kind)
        self.idle.clear()
        self._observer.request_submitted(stream.adapter, stream.kind)
        return stream

    def deliver(self, result: StepResult) -> None:
        """Hand on what a step has brought. What the observer raises comes out of here."""
        now = time.monotonic()
        for output in result.outputs:
            stream = self._open.get(output.request_id)
            if stream is None:
                continue
            # The reader first: whatever the observer does, an output that was taken off the list is read.
            stream.put(output)
            if output.terminal:
                self._close(stream)
            if output.token_ids:
                interval = None if stream.last_tokens is None else now - stream.last_tokens
                self._observer.tokens_generated(
                    stream.adapter, stream.kind, output.path.value, len(output.token_ids), interval
                )
                stream.last_tokens = now
            if output.terminal:
                self._observer.request_finished(stream.adapter, stream.kind, output.finished, output.error)
        self._tell(result)

    def _close(self, stream: Stream) -> None:
        del self._open[stream.id]
        if not self._open:
            self.idle.set()

    def _tell(self, result: StepResult) -> None:
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

    def fail(self, error: PolygraftError) -> None:
        """End all of them with an error, whatever the observer says to it."""
        ended = list(self._open.values())
        for stream in ended:
            stream.put(RequestOutput(stream.id, error=error))
            self._close(stream)
        for stream in ended:
            try:
                self._observer.request_finished(stream.adapter, stream.kind, None, error)
            except Exception:
                log.exception("an end wasn't counted")
