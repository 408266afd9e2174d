"""Converts a gRPC status to one of this package's errors."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from polygraft_client._exceptions import (
    AlreadyExists,
    Cancelled,
    ConnectError,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    InternalError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    PolygraftError,
    ResourceExhausted,
    StatusError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)

STATUS_ERRORS: Mapping[grpc.StatusCode, type[StatusError]] = MappingProxyType(
    {
        grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
        grpc.StatusCode.OUT_OF_RANGE: InvalidArgument,
        grpc.StatusCode.NOT_FOUND: NotFound,
        grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
        grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
        grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
        grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
        grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
        grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
        grpc.StatusCode.UNAVAILABLE: Unavailable,
        grpc.StatusCode.ABORTED: InternalError,
        grpc.StatusCode.DATA_LOSS: InternalError,
        grpc.StatusCode.INTERNAL: InternalError,
        grpc.StatusCode.UNKNOWN: InternalError,
    }
)
"""The codes of a server's answer. CANCELLED and DEADLINE_EXCEEDED have errors of their own."""

_NO_SERVER = "no server is listening there; `polygraft serve` starts one"
_HTTP1 = "what answers there speaks HTTP/1, not gRPC; name the gRPC port, not the one for metrics"
_PLAIN = "what answers there doesn't speak TLS; leave out `credentials`, or name a proxy that does"
_TRANSPORT: Mapping[str, str] = MappingProxyType(
    {
        "Connection refused": _NO_SERVER,
        "connect failed: addr: unix": _NO_SERVER,
        "http1.x server": _HTTP1,
        "WRONG_VERSION_NUMBER": _PLAIN,
    }
)
"""Parts of messages of gRPC's transport, and what to say instead."""


def error_from_rpc(error: grpc.RpcError, address: str) -> PolygraftError:
    """Translate what grpc raised for a call to `address`."""
    code, message = error.code(), error.details() or error.code().value[1]
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        if message == "Deadline Exceeded":  # the transport's own words
            message = "no answer within the call's timeout"
        return DeadlineExceeded(f"{address}: {message}")
    if code is grpc.StatusCode.CANCELLED:
        return Cancelled(f"{address}: {message}")
    details = _Details(error)
    if code is grpc.StatusCode.UNAVAILABLE and not details.reason:
        # The transport makes up UNAVAILABLE by itself; only a server attaches a reason to it.
        meaning = next((meant for part, meant in _TRANSPORT.items() if part in message), message)
        return ConnectError(address, meaning)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and not details.reason and "larger than max" in message:
        message += ": the request or its answer is larger than the server's --max-message-bytes allows"
    if code is grpc.StatusCode.UNIMPLEMENTED and not details.reason:
        message = f"{address}: {message} The server there is older than this client, or isn't Polygraft"
    return STATUS_ERRORS[code](
        message,
        reason=details.reason,
        violations=details.violations,
        retry_after=details.retry_after,
        metadata=details.metadata,
        request_id=_request_id(error),
    )


def _request_id(error: grpc.RpcError) -> str:
    """The call's id, which the server sends in the trailing metadata."""
    trailers = dict(cast(grpc.Call, error).trailing_metadata() or ())
    found = trailers.get("x-request-id", "")
    return found if isinstance(found, str) else found.decode()


def error_from_cancellation(error: asyncio.CancelledError, address: str) -> Cancelled:
    """Translate the CancelledError of a call; raises it on if the task itself is being cancelled.

    grpc.aio also raises it in a task that waits for a call whose stream or client was closed elsewhere.
    That task isn't cancelled, and its callers mustn't take it for cancelled.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise error
    return Cancelled(f"{address}: the stream or its client was closed")


class _Details:
    """The google.rpc details of a status that this package shows."""

    def __init__(self, error: grpc.RpcError) -> None:
        self.reason = ""
        self.metadata: dict[str, str] = {}
        self.violations: list[FieldViolation] = []
        self.retry_after: float | None = None
        try:
            status = rpc_status.from_call(cast(grpc.Call, error))
        except ValueError:  # details that contradict their status are ignored
            status = None
        for packed in status.details if status is not None else ():
            info, request, retry = (
                error_details_pb2.ErrorInfo(),
                error_details_pb2.BadRequest(),
                error_details_pb2.RetryInfo(),
            )
            if packed.Unpack(info):
                self.reason, self.metadata = info.reason, dict(info.metadata)
            elif packed.Unpack(request):
                self.violations += [FieldViolation(v.field, v.description) for v in request.field_violations]
            elif packed.Unpack(retry):
                self.retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
