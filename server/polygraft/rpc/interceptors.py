"""What happens around every call: id, gate, authorisation, parsing, errors, access log, metrics."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, NoReturn, Protocol

import grpc
from google.protobuf.message import DecodeError

from polygraft.engine.workers.worker import Worker
from polygraft.errors import InvalidRequest, PolygraftError, ResourceExhausted, Unauthenticated
from polygraft.rpc.access_log import AccessLog, CallRecord
from polygraft.rpc.calls import Calls
from polygraft.rpc.limits import MessageLimits
from polygraft.rpc.plain_services import bounded
from polygraft.rpc.status import code_of, to_status
from polygraft.rpc.writes import Writes
from polygraft.telemetry.logging import request_id

REQUEST_ID_KEY = "x-request-id"
"""Metadata key of the request id: taken from the call if it is sane, returned in the trailers."""

_DETAILS_KEY = "grpc-status-details-bin"
_OWN_PREFIX = "/polygraft.v1."
_ADMIN_PREFIX = "/polygraft.v1.AdapterService/"

_log = logging.getLogger("polygraft.rpc")

Context = grpc.aio.ServicerContext[Any, Any]

_QUICK_BYTES = 65_536
"""The event loop parses messages up to this size itself, in 1 ms."""
_STATUS_SECONDS = 5.0
"""How long sending an error may take."""
_TRAVEL = 0.02
"""Seconds that a message takes at most, between machines that are near each other."""


class CallObserver(Protocol):
    """Is told about every call that ended; `code` is the status code's name."""

    def call_finished(self, method: str, code: str) -> None:
        """A call ended; `method` is one of the contract's, as /package.Service/Method."""

    def stream_unread(self, limit: str) -> None:
        """A stream was ended because its output was unread for too long; `limit` is "time"."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the contract's methods; for health and reflection it only checks the messages' size.

    Args:
        calls: where calls in flight are kept.
        limits: on the size of messages.
        worker: parses large messages.
        writes: sends the messages of streams.
        access_log: gets a line for each call.
        observer: is told about each call's end.
        admin_token: what AdapterService asks for; None asks for nothing.
    """

    def __init__(
        self,
        calls: Calls,
        limits: MessageLimits,
        worker: Worker,
        writes: Writes,
        access_log: AccessLog,
        observer: CallObserver | None = None,
        admin_token: str | None = None,
    ) -> None:
        self._calls = calls
        self._limits = limits
        self._worker = worker
        self._writes = writes
        self._access_log = access_log
        self._observer = observer
        self._expected = None if admin_token is None else f"Bearer {admin_token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler of one of the contract's methods."""
        handler = await continuation(handler_call_details)
        details = handler_call_details
        if handler is None:
            return None
        if not details.method.startswith(_OWN_PREFIX):
            return bounded(handler, details.method, self._limits)

        # Requests are parsed in here: left to gRPC, a malformed one would end as UNKNOWN with a traceback.
        async def unary_unary(data: bytes, context: Context) -> Any:
            async with self._call(details, context):
                return await handler.unary_unary(await self._parse(details.method, handler, data), context)

        # A coroutine that writes, so that a dropped call closes the servicer's generator before it
        # returns; of a generator handed to gRPC that would be the garbage collector's task.
        async def unary_stream(data: bytes, context: Context) -> None:
            async with self._call(details, context):
                request = await self._parse(details.method, handler, data)
                async with aclosing(handler.unary_stream(request, context)) as responses:
                    async for response in responses:
                        await self._writes.send(context, response)

        async def stream_unary(requests: AsyncIterator[Any], context: Context) -> Any:
            async with self._call(details, context):
                return await handler.stream_unary(requests, context)

        serializer = _serializer(handler)
        if handler.request_streaming:
            assert not handler.response_streaming, "the contract has no method that streams both ways"
            return grpc.stream_unary_rpc_method_handler(
                stream_unary, handler.request_deserializer, serializer
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(unary_stream, None, serializer)
        return grpc.unary_unary_rpc_method_handler(unary_unary, None, serializer)

    async def _parse(self, method: str, handler: grpc.RpcMethodHandler[Any, Any], data: bytes) -> Any:
        self._limits.check(method, len(data))
        parse = handler.request_deserializer
        assert parse is not None, "generated handlers have one"
        try:
            return parse(data) if len(data) <= _QUICK_BYTES else await self._worker.run(lambda: parse(data))
        except DecodeError as error:
            raise InvalidRequest("request", "not a valid message, or a string in it is not UTF-8") from error

    @asynccontextmanager
    async def _call(self, details: grpc.HandlerCallDetails, context: Context) -> AsyncIterator[None]:
        metadata = dict(details.invocation_metadata)
        name = self._calls.enter(_text(metadata.get(REQUEST_ID_KEY)))
        request_id.set(name)
        record = self._access_log.begin(details.method, context.peer())
        started = time.perf_counter()
        code = grpc.StatusCode.OK
        try:
            context.set_trailing_metadata(((REQUEST_ID_KEY, name),))
            self._admit(details.method, metadata)
            yield
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or not task.cancelling():
                # Not this call was cancelled but something it waited for: gRPC would answer nothing at all.
                code = grpc.StatusCode.INTERNAL
                await self._abort(record, context, name, RuntimeError(repr(error)))
            remaining = context.time_remaining()
            # The caller's clock may end the call first, and its word for that is a cancellation.
            expired = remaining is not None and remaining <= _TRAVEL
            code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.BaseError:  # gRPC's own: the caller went away while something was being sent
            code = grpc.StatusCode.CANCELLED
            raise
        except GeneratorExit:
            raise
        except BaseException as error:  # noqa: BLE001 - the one place where errors become statuses
            # A Rust panic isn't an Exception, and gRPC would never answer. A SystemExit would end the loop.
            code = code_of(error)
            await self._abort(record, context, name, error)
        finally:
            self._calls.leave(name)
            if self._observer is not None:
                self._observer.call_finished(details.method, code.name)
            self._access_log.end(record, code, time.perf_counter() - started)

    async def _abort(self, record: CallRecord, context: Context, name: str, error: BaseException) -> NoReturn:
        code = code_of(error)
        record.reason = error.reason if isinstance(error, PolygraftError) else "INTERNAL"
        if code is grpc.StatusCode.INTERNAL:
            _log.error("%s failed", record.method, exc_info=error)
        status = to_status(error, name)
        trailers = ((_DETAILS_KEY, status.SerializeToString()), (REQUEST_ID_KEY, name))
        try:
            async with asyncio.timeout(_STATUS_SECONDS):
                await context.abort(code, status.message, trailers)
        except TimeoutError:
            # The status is queued behind output that nobody reads. gRPC would keep waiting; we don't.
            raise asyncio.CancelledError from None
        raise AssertionError("abort raises")

    def _admit(self, method: str, metadata: dict[str, str | bytes]) -> None:
        if self._calls.refusal is not None:
            raise self._calls.refusal.with_traceback(None)  # one object for all: frames would pile up
        if not method.startswith(_ADMIN_PREFIX):
            # Each call keeps its message in memory. AdapterService is exempt, since it may fix the overload.
            most = self._calls.most
            if most is not None and len(self._calls) > most:
                raise ResourceExhausted(f"{most} other calls are in flight, which is the limit")
            return
        if self._expected is None:
            return
        given = metadata.get("authorization", b"")
        if not hmac.compare_digest(given.encode() if isinstance(given, str) else given, self._expected):
            what = "holds another token than the server's" if given else "is missing"
            raise Unauthenticated(
                f"this call needs the server's admin token: the metadata 'authorization: Bearer TOKEN' {what}"
            )


def _serializer(handler: grpc.RpcMethodHandler[Any, Any]) -> Callable[[Any], bytes]:
    serialize = handler.response_serializer
    assert serialize is not None, "generated handlers have one"

    def pass_bytes(response: Any) -> bytes:
        # Servicers have large answers serialized off the event loop.
        return response if isinstance(response, bytes) else serialize(response)

    return pass_bytes


def _text(value: str | bytes | None) -> str | None:
    return value if isinstance(value, str) else None
