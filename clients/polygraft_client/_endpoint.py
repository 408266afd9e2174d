"""A server's address and how to call it, checked before anything is sent."""

from __future__ import annotations

import ipaddress
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

import grpc

from polygraft_client._exceptions import InvalidRequest

_SCHEMES = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "vsock:", "xds:")
"""Schemes that gRPC resolves itself."""

DEFAULT_PORT = 50051
"""The port that `polygraft serve` listens on by default."""

_LONGEST_SECONDS = 1e9
"""A longer timeout overflows in gRPC and would expire at once."""

# Calls that change nothing may be repeated when the connection breaks or the server is shutting down. Loads
# and unloads may not: the first try may have succeeded, and the second would be answered differently.
_RETRIED = [
    {"service": "polygraft.v1.InferenceService"},
    {"service": "polygraft.v1.AdapterService", "method": "GetAdapter"},
    {"service": "polygraft.v1.AdapterService", "method": "ListAdapters"},
]


@dataclass(frozen=True)
class Endpoint:
    """A server's address and how to call it.

    Args:
        address: HOST or HOST:PORT, or a target that gRPC knows by its scheme, such as `unix:/path` or `dns:///host:1`.
        token: sent with every call as `authorization: Bearer TOKEN`; white space around it is stripped, and
            an empty one counts as none.
        timeout: seconds for a call that gives none, or None.
        credentials: for TLS; None is plain text.
        retries: how often gRPC repeats a call after UNAVAILABLE, from 0 to 4.

    Raises:
        InvalidRequest: one of them can't be used; the token isn't repeated.
    """

    address: str
    token: str | None = field(repr=False)
    timeout: float | None
    credentials: grpc.ChannelCredentials | None
    retries: int

    def __post_init__(self) -> None:
        if not isinstance(self.retries, int) or not 0 <= self.retries <= 4:
            raise InvalidRequest("retries", f"expected 0 to 4, got {self.retries!r}")
        if not isinstance(self.credentials, grpc.ChannelCredentials | None):
            raise InvalidRequest("credentials", "expected grpc.ChannelCredentials, or None for plain text")
        _check_seconds(self.timeout)
        object.__setattr__(self, "address", _target(self.address))
        object.__setattr__(self, "token", _bare(self.token))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Sent with every call."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    @property
    def options(self) -> list[tuple[str, Any]]:
        """The channel's options."""
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", -1),  # the server bounds what it sends
            ("grpc.service_config", json.dumps(self._service_config())),
        ]
        if _is_loopback(self.address):
            # grpc takes http_proxy from the environment, and a proxy can't reach this machine's own loopback
            options.append(("grpc.enable_http_proxy", 0))
        return options

    def deadline(self, timeout: float | None) -> float | None:
        """Seconds for one call; raises InvalidRequest."""
        _check_seconds(timeout)
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


def _target(address: object) -> str:
    """HOST:PORT as gRPC reads it, an IPv6 host in brackets. Without a port it is `DEFAULT_PORT`."""
    if not isinstance(address, str):
        raise InvalidRequest("address", f"expected HOST or HOST:PORT, got {address!r}")
    text = address.strip()
    if text.startswith(_SCHEMES):
        return text
    if "://" in text:
        raise InvalidRequest(
            "address",
            f"expected HOST or HOST:PORT, got {address!r}: gRPC addresses have no scheme, so leave out "
            f"{text.partition('://')[0] + '://'!r}. Connections are plain text; only the Python client takes "
            "`credentials` for TLS",
        )
    if host := _host(text):  # no port
        return f"{host}:{DEFAULT_PORT}"
    before, colon, port = text.rpartition(":")
    host = _host(before)
    if not colon or host is None or not (port.isascii() and port.isdigit()) or not 0 < int(port) <= 65535:
        raise InvalidRequest("address", f"expected HOST or HOST:PORT, got {address!r}")
    return f"{host}:{port}"


def _host(text: str) -> str | None:
    """A name, an IPv4 address, or an IPv6 address in brackets; None if it is none of them.

    A bare IPv6 address may end in what looks like a port. Then the port follows the last colon, as the
    server reads it.
    """
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if ":" not in bare:
        return bare if bare == text and re.fullmatch(r"[A-Za-z0-9._-]+", bare) else None
    try:
        address = ipaddress.IPv6Address(bare)
    except ValueError:
        return None
    with_port = bare == text and bare.rpartition(":")[2].isdigit() and _host(bare.rpartition(":")[0])
    return None if with_port else f"[{address}]"


def _bare(token: object) -> str | None:
    """A token as a header can carry it."""
    if token is None:
        return None
    if not isinstance(token, str):
        raise InvalidRequest("token", f"expected str, got {type(token).__name__}")
    bare = token.strip()
    if not re.fullmatch(r"[\x20-\x7e]*", bare):
        raise InvalidRequest("token", "holds a character that no header can carry: printable ASCII can")
    return bare or None


def _check_seconds(timeout: object) -> None:
    if timeout is None:
        return
    if not isinstance(timeout, int | float) or not math.isfinite(timeout) or timeout > _LONGEST_SECONDS:
        raise InvalidRequest("timeout", f"expected seconds, at most {_LONGEST_SECONDS:.0e}, got {timeout!r}")


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
