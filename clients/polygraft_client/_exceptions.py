"""The errors that the client raises.

PolygraftError
├── InvalidRequest          the arguments can't be expressed in the contract; nothing was sent
├── UsageError              the client is closed or used on another event loop; nothing was sent
├── ConnectError            the server can't be reached, or the connection broke; names the address
├── DeadlineExceeded        `timeout` seconds have passed
├── Cancelled               the call was cancelled: a stream closed here, or a request aborted there
└── StatusError             the server answered with an error
    ├── InvalidArgument     a field is wrong, or the prompt doesn't fit; lists the violations
    ├── NotFound            no such adapter or generation
    ├── AlreadyExists       the adapter's name is taken by other content
    ├── FailedPrecondition  the adapter's state forbids the call
    ├── ResourceExhausted   the queue, the memory or the slots are full
    ├── Unimplemented       in the contract, but not implemented by this server
    ├── Unauthenticated     no valid token
    ├── PermissionDenied    the token doesn't allow it
    ├── Unavailable         the server is shutting down
    └── InternalError       a fault of the server; its log explains the id in the message
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class PolygraftError(Exception):
    """The root of the tree."""


class InvalidRequest(PolygraftError, ValueError):
    """The arguments can't be expressed in the contract; nothing was sent.

    Args:
        argument: the argument's name.
        problem: what is wrong with it.
    """

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(f"{argument}: {problem}")
        self.argument = argument
        self.problem = problem


class UsageError(PolygraftError, RuntimeError):
    """The client can't be used: it is closed, or on another event loop than its own. Nothing was sent."""


class ConnectError(PolygraftError):
    """The server can't be reached, or the connection broke.

    Args:
        address: HOST:PORT, as given to the client.
        problem: what the transport said.
    """

    def __init__(self, address: str, problem: str) -> None:
        super().__init__(f"{address}: {problem}")
        self.address = address


class DeadlineExceeded(PolygraftError):
    """The call took longer than its `timeout`; the server has dropped the request."""


class Cancelled(PolygraftError):
    """The call was cancelled: a stream that was closed here, or a request aborted on the server."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One thing that is wrong with a request; `field` is a path such as `sampling.top_p`."""

    field: str
    description: str


class StatusError(PolygraftError):
    """The server answered with an error.

    Args:
        message: the server's text.
        reason: a stable code such as "ADAPTER_NOT_FOUND", "" if the answer didn't come from Polygraft.
        violations: what is wrong with the request, field by field.
        retry_after: seconds after which to try again, or None.
        metadata: further details from the server, such as the adapter's name.
        request_id: the id under which the server's log knows the call; "" if the server sent none.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        violations: Sequence[FieldViolation] = (),
        retry_after: float | None = None,
        metadata: dict[str, str] | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.violations = tuple(violations)
        self.retry_after = retry_after
        self.metadata = metadata or {}
        self.request_id = request_id


class InvalidArgument(StatusError):
    """A field is wrong, or the prompt and its output don't fit the context."""


class NotFound(StatusError):
    """No such adapter or generation."""


class AlreadyExists(StatusError):
    """The adapter's name is taken by other content."""


class FailedPrecondition(StatusError):
    """The adapter's state forbids the call."""


class ResourceExhausted(StatusError):
    """The queue, the memory or the slots are full."""


class Unimplemented(StatusError):
    """The contract defines it, but this server doesn't implement it."""


class Unauthenticated(StatusError):
    """The call has no valid token."""

    def __str__(self) -> str:
        return f"{self.message}; give it to the client as `token`"


class PermissionDenied(StatusError):
    """The token doesn't allow the call."""


class Unavailable(StatusError):
    """The server is shutting down and takes no new work."""


class InternalError(StatusError):
    """A fault of the server, or a status that the contract doesn't name."""
