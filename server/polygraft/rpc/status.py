"""From exceptions to gRPC statuses: one table, and the google.rpc details that explain an error."""

from __future__ import annotations

import grpc
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from polygraft import errors

DOMAIN = "polygraft"
"""The domain of every ErrorInfo."""

_MAX_MESSAGE = 512
_MAX_DESCRIPTION = 300
_MAX_VIOLATIONS = 20
# An HTTP/2 peer may refuse more than 8 KiB of trailers, and there the details travel in base64.
_MAX_DETAILS = 3500

CODES: dict[type[errors.PolygraftError], grpc.StatusCode] = {
    errors.PolygraftError: grpc.StatusCode.INTERNAL,
    errors.ConfigError: grpc.StatusCode.INTERNAL,
    errors.BaseModelError: grpc.StatusCode.INTERNAL,
    errors.LayoutMismatch: grpc.StatusCode.INTERNAL,
    errors.UnsupportedArchitecture: grpc.StatusCode.INTERNAL,
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ContextLengthExceeded: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotSupported: grpc.StatusCode.UNIMPLEMENTED,
    errors.ChatTemplateFailed: grpc.StatusCode.FAILED_PRECONDITION,
    errors.TokenizerFailed: grpc.StatusCode.FAILED_PRECONDITION,
    errors.AdapterError: grpc.StatusCode.INTERNAL,
    errors.AdapterNotFound: grpc.StatusCode.NOT_FOUND,
    errors.AdapterExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.AdapterInvalid: grpc.StatusCode.INVALID_ARGUMENT,
    errors.AdapterUnavailable: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.OutputUnread: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Draining: grpc.StatusCode.UNAVAILABLE,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.EngineDead: grpc.StatusCode.INTERNAL,
}


def code_of(error: BaseException) -> grpc.StatusCode:
    """The code for an error; INTERNAL for all that weren't raised on purpose."""
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    return grpc.StatusCode.INTERNAL


def to_status(error: BaseException, request_id: str) -> status_pb2.Status:
    """The google.rpc.Status that a caller gets for an error.

    An INTERNAL one tells nothing but `request_id`, under which the log has the rest.
    """
    code = code_of(error)
    reason = error.reason if isinstance(error, errors.PolygraftError) else "INTERNAL"
    if code is grpc.StatusCode.INTERNAL:
        message = f"internal error; the server's log has it under {request_id}"
        details: list[Message] = [_error_info(reason, {"request_id": request_id})]
    else:
        message = _shorten(str(error), _MAX_MESSAGE)
        details = _details(error, reason)
    status = status_pb2.Status(code=code_pb2.Code.Value(code.name), message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return status


def _details(error: BaseException, reason: str) -> list[Message]:
    match error:
        case errors.AdapterInvalid():
            violations = [("source", problem) for problem in error.problems]
            return [_error_info(reason, {"adapter": error.name}), _bad_request(violations, error.total)]
        case errors.InvalidRequest():
            return [_error_info(reason, {}), _bad_request([(error.field, error.problem)], 1)]
        case errors.NotSupported():
            return [_error_info(reason, {"field": error.field})]
        case errors.AdapterError():
            return [_error_info(reason, {"adapter": error.name})]
        case errors.ResourceExhausted():
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(round(error.retry_after * 1000))
            return [_error_info(reason, {}), retry]
    return [_error_info(reason, {})]


def _error_info(reason: str, metadata: dict[str, str]) -> error_details_pb2.ErrorInfo:
    short = {key: _shorten(value, _MAX_DESCRIPTION) for key, value in metadata.items()}
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=short)


def _bad_request(violations: list[tuple[str, str]], total: int) -> error_details_pb2.BadRequest:
    """As many violations as fit into the trailers, and a count of the rest of `total`."""
    bad = error_details_pb2.BadRequest()
    for done, (field, problem) in enumerate(violations):
        if done == _MAX_VIOLATIONS or bad.ByteSize() > _MAX_DETAILS - 2 * _MAX_DESCRIPTION:
            bad.field_violations.add(field=field, description=f"and {total - done} more problems")
            break
        bad.field_violations.add(
            field=_shorten(field, _MAX_DESCRIPTION // 2), description=_shorten(problem, _MAX_DESCRIPTION)
        )
    return bad


def _shorten(text: str, limit: int) -> str:
    """At most `limit` bytes of UTF-8; what can't be encoded (a file name may hold it) is replaced."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return data.decode("utf-8")
    return data[: limit - 3].decode("utf-8", "ignore") + "..."
