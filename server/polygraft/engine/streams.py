"""Carries outputs from the engine's steps to the readers of the requests' answers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator

from polygraft.adapters.stack import Stack
from polygraft.core.output import RequestOutput
from polygraft.engine.client import Observer
from polygraft.engine.events import AdapterChange, AdapterEvent, Event, PathDecision
from polygraft.engine.step_result import StepResult
from polygraft.engine.unread import Unread
from polygraft.errors import OutputUnread, PolygraftError
from polygraft_types.adapters import MergeEvent

log = logging.getLogger(__name__)


TOGETHER = 64
"""All streams together may have so many times one's limit unread; beyond it the one with the most ends."""


class Stream:
    """One request as the event loop sees it.

    Args:
        adapter, kind: as reported to the observer.
    """

    def __init__(self, request_id: str, adapter: str, kind: str, streams: Streams) -> None:
        self.id = request_id
        self.adapter = adapter
        self.kind = kind
        self.last_tokens: float | None = None
        self.unread = Unread()
        self._streams = streams
        self._reads = True
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: RequestOutput) -> None:
        """Hand an output to the reader, if there still is one."""
        if not self._reads:
            return
        before = self.unread.bytes
        self.unread.add(output)
        self._streams.weigh(self, self.unread.bytes - before)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def behind(self) -> bool:
        """Whether its reader isn't waiting for output right now."""
        return self._waiter is None

    async def take(self) -> RequestOutput:
        """Wait for output and return what has come since the last call, as one output."""
        while not self.unread:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        before = self.unread.bytes
        output = self.unread.take()
        self._streams.weigh(self, self.unread.bytes - before)
        return output

    def give_up(self, error: PolygraftError) -> None:
        """Drop the unread output; the reader finds only the error."""
        self.close()
        self._reads = True
        self.put(RequestOutput(self.id, error=error))
        self._reads = False

    def close(self) -> None:
        """Mark the stream as no longer read."""
        self._reads = False
        self._streams.weigh(self, -self.unread.bytes)
        self.unread.clear()


class Streams:
    """The requests that the engine has and hasn't ended. Belongs to the event loop's thread.

    Each gets exactly one terminal output: the engine's, the error of `fail`, or the error for too much unread
    output.

    Args:
        max_unread: limit of one stream's unread output in bytes; `TOGETHER` times that in all.
        abort: ends a request in the engine whose output is no longer wanted.
    """

    def __init__(self, observer: Observer, max_unread: int, abort: Callable[[str], None]) -> None:
        self._observer = observer
        self._max_unread = max_unread
        self._abort = abort
        self._open: dict[str, Stream] = {}
        self._lying: dict[Stream, None] = {}
        self._unread = 0
        self.idle = asyncio.Event()
        """Set while there is none."""
        self.idle.set()

    def weigh(self, stream: Stream, more: int) -> None:
        """Count so many more unread bytes in a stream, and end one if they are too many."""
        self._unread += more
        if stream.unread:
            self._lying[stream] = None
        else:
            self._lying.pop(stream, None)
        # A waiting reader takes any amount, however much comes at once.
        if more <= 0 or not stream.behind:
            return
        if stream.unread.bytes > self._max_unread:
            self._give_up(stream)
        elif self._unread > self._max_unread * TOGETHER:
            behind = (lying for lying in self._lying if lying.behind)
            self._give_up(max(behind, key=lambda lying: lying.unread.bytes))

    def _give_up(self, stream: Stream) -> None:
        stream.give_up(OutputUnread(f"{stream.unread.bytes} bytes of output were unread, too many to keep"))
        if stream.id in self._open:
            self._abort(stream.id)
        self._observer.stream_unread("bytes")

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
        stream = Stream(request_id, stack.label, stack.kind, self)
        self._observer.request_submitted(stream.adapter, stream.kind)
        self._open[request_id] = stream
        self.idle.clear()
        return stream

    def deliver(self, result: StepResult) -> None:
        """Hand on a step's result. Raises what the observer raises."""
        now = time.monotonic()
        for output in result.outputs:
            stream = self._open.get(output.request_id)
            if stream is None:
                continue
            # The reader first, so that an error of the observer loses no output.
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
        self._observer.unread_changed(self._unread)
        for event in result.events:
            self._tell_event(event)

    def _tell_event(self, event: Event) -> None:
        match event:
            case MergeEvent():
                self._observer.merge_ended(event)
            case PathDecision(path):
                self._observer.path_decided(path)
            case AdapterEvent(AdapterChange.CHANGED, info):
                self._observer.adapter_changed(info)
            case AdapterEvent(AdapterChange.REMOVED, info):
                self._observer.adapter_removed(info)
            case AdapterEvent(AdapterChange.LOAD_FAILED, info):
                self._observer.adapter_load_failed(info)

    def fail(self, error: PolygraftError) -> None:
        """End all requests with an error, even if the observer raises."""
        ended = list(self._open.values())
        for stream in ended:
            stream.put(RequestOutput(stream.id, error=error))
            self._close(stream)
        for stream in ended:
            try:
                self._observer.request_finished(stream.adapter, stream.kind, None, error)
            except Exception:
                log.exception("the end of a request wasn't counted")
