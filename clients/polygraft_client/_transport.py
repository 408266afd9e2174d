"""Channels: where a server is, how to reach it, and one call through to it."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from polygraft_client._calls import Call
from polygraft_client._exceptions import InvalidRequest
from polygraft_client._status import error_from_cancellation, error_from_rpc

_R = TypeVar("_R")
_R_co = TypeVar("_R_co", covariant=True)

# Calls that change nothing may be sent again after a lost connection or to a draining server. A load
# or unload may have happened already, and the second answer would be another one.
_RETRIED = [
    {"service": "polygraft.v1.InferenceService"},
    {"service": "polygraft.v1.AdapterService", "method": "GetAdapter"},
    {"service": "polygraft.v1.AdapterService", "method": "ListAdapters"},
]


@dataclass(frozen=True)
class Endpoint:
    """A server and how this client talks to it.

    Args:
        address: HOST:PORT.
        token: sent with every call as `authorization: Bearer TOKEN`.
        timeout: seconds for a call that doesn't say, or None.
        credentials: for TLS; None is plain text.
        retries: further tries that gRPC makes after UNAVAILABLE, from 0 to 4.
    """

    address: str
    token: str | None = field(repr=False)
    timeout: float | None
    credentials: grpc.ChannelCredentials | None
    retries: int

    def __post_init__(self) -> None:
        if not 0 <= self.retries <= 4:
            raise InvalidRequest("retries", f"expected 0 to 4, got {self.retries}")

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes along with every call."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    @property
    def options(self) -> list[tuple[str, Any]]:
        """The channel's options."""
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", -1),  # the server bounds what it sends
            ("grpc.service_config", json.dumps(self._service_config())),
        ]
        if _is_loopback(self.address):
            # grpc takes http_proxy from the environment, which can't lead to this machine itself
            options.append(("grpc.enable_http_proxy", 0))
        return options

    def deadline(self, timeout: float | None) -> float | None:
        """Seconds for one call."""
        return self.timeout if timeout is None else timeout

    def _service_config(self) -> dict[str, Any]:
        if self.retries == 0:
            return {}
        policy = {
            "maxAttempts": self.retries + 1,
            "initialBackoff": "0.1s",
            "maxBackoff": "1s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE"],
        }
        return {"methodConfig": [{"name": _RETRIED, "retryPolicy": policy}]}


class ResponseIterator(Protocol[_R_co]):
    """The responses of a streaming call, which can be cancelled."""

    def __next__(self) -> _R_co:
        """The next response; raises grpc.RpcError."""

    def cancel(self) -> bool:
        """Give the call up; does nothing after its end."""


class Transport:
    """Sends calls and waits for them."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def run(self, call: Call[_R], timeout: float | None = None) -> _R:
        """Make one call; raises PolygraftError."""
        method = self._channel.unary_unary(call.method, _serialize, call.parse)
        try:
            return method(
                call.request, timeout=self.endpoint.deadline(timeout), metadata=self.endpoint.metadata
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error, self.endpoint.address) from error

    def open(self, call: Call[_R], timeout: float | None = None) -> ResponseIterator[_R]:
        """Start a streaming call."""
        method = self._channel.unary_stream(call.method, _serialize, call.parse)
        return method(call.request, timeout=self.endpoint.deadline(timeout), metadata=self.endpoint.metadata)

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self._channel.close()

    @cached_property
    def _channel(self) -> grpc.Channel:
        address, options = self.endpoint.address, self.endpoint.options
        if self.endpoint.credentials is not None:
            return grpc.secure_channel(address, self.endpoint.credentials, options)
        return grpc.insecure_channel(address, options)


class AsyncTransport:
    """Sends calls on the running event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    async def run(self, call: Call[_R], timeout: float | None = None) -> _R:
        """Make one call; raises PolygraftError."""
        method = self._channel.unary_unary(call.method, _serialize, call.parse)
        try:
            return await method(
                call.request, timeout=self.endpoint.deadline(timeout), metadata=self.endpoint.metadata
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error, self.endpoint.address) from error
        except asyncio.CancelledError as error:
            raise error_from_cancellation(error, self.endpoint.address) from error

    def open(self, call: Call[_R], timeout: float | None = None) -> grpc.aio.UnaryStreamCall[Message, _R]:
        """Start a streaming call."""
        method = self._channel.unary_stream(call.method, _serialize, call.parse)
        return method(call.request, timeout=self.endpoint.deadline(timeout), metadata=self.endpoint.metadata)

    async def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        await self._channel.close()

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        # Made at the first call, not with the client: a channel belongs to the loop it is made on.
        address, options = self.endpoint.address, self.endpoint.options
        if self.endpoint.credentials is not None:
            return grpc.aio.secure_channel(address, self.endpoint.credentials, options)
        return grpc.aio.insecure_channel(address, options)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
