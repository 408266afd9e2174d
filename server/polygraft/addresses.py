"""Where the server listens. Addresses are parsed, resolved and bound before anything slow begins."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from polygraft.errors import ConfigError

OFF = "off"
"""Given in place of an address to turn the metrics endpoint off."""

PRIVILEGED = 1024
"""Ports below this one need privileges."""


@dataclass(frozen=True, slots=True)
class Address:
    """HOST:PORT as it was given; port 0 lets the system choose one.

    Args:
        flag: the setting that it was given in, for errors.
        host: a name, or an IPv4 or IPv6 address without brackets.
    """

    flag: str
    host: str
    port: int

    @classmethod
    def parse(cls, flag: str, text: str) -> Self:
        """Read HOST:PORT. The port follows the last colon, so an IPv6 host may do without brackets.

        Raises:
            ConfigError: the text isn't of that form.
        """
        host, colon, port = text.strip().rpartition(":")
        if not colon or not (port.isascii() and port.isdigit()):
            raise ConfigError(flag, f"expected HOST:PORT, got {text!r}")
        if int(port) > 65535:
            raise ConfigError(flag, f"port {port} is more than 65535")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
            if not _is_ipv6(host):
                raise ConfigError(flag, f"{host!r} in brackets isn't an IPv6 address")
        if not host:
            raise ConfigError(
                flag, f"expected HOST:PORT, got {text!r}; every address of this machine is 0.0.0.0 or [::]"
            )
        if ":" in host and not _is_ipv6(host):
            raise ConfigError(flag, f"{host!r} isn't an IPv6 address; the port follows the last colon")
        if any(character.isspace() or character in "[]/" for character in host):
            raise ConfigError(flag, f"{host!r} isn't a host")
        return cls(flag, host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def with_port(self, port: int) -> Address:
        """The same host with another port."""
        return Address(self.flag, self.host, port)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it. Names other than localhost may resolve to anything."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def resolve(self) -> list[Address]:
        """The host's numeric addresses that belong to this machine, at least one.

        Raises:
            ConfigError: the name can't be resolved, or none of its addresses is this machine's.
        """
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except (OSError, UnicodeError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(self.flag, f"can't resolve {self.host!r}: {why}") from error
        # "localhost" often resolves to an IPv6 address on machines without IPv6.
        hosts = [host for host in dict.fromkeys(str(target[0]) for *_, target in found) if _is_own(host)]
        if not hosts:
            raise ConfigError(self.flag, f"can't listen on {self}: {self.host} is no address of this machine")
        return [Address(self.flag, host, self.port) for host in hosts]


class Reservation:
    """Keeps ports from other processes until the servers listen on them.

    Port 0 isn't kept, since the system chooses the port later.

    Raises:
        ConfigError: an address is malformed, unknown, not this machine's, taken or not allowed, or two
            settings give the same one.
    """

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._sockets: dict[str, list[socket.socket]] = {flag: [] for flag in settings}
        held: list[Address] = []
        try:
            for flag, text in settings.items():
                wanted = Address.parse(flag, text)
                found = wanted.resolve()
                for address in found:
                    for other in held:
                        if _overlap(address, other):
                            raise ConfigError(
                                flag, f"{wanted} is {other.flag}'s as well: each needs a port of its own"
                            )
                    self._sockets[flag].append(_bound(address, wanted))
                held += found
        except ConfigError:
            self.release_all()
            raise

    def release(self, flag: str) -> None:
        """Release a setting's ports. Listen on them right afterwards, before another process can."""
        for holder in self._sockets.pop(flag, ()):
            holder.close()

    def release_all(self) -> None:
        """Release every port that is still reserved."""
        for flag in [*self._sockets]:
            self.release(flag)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release_all()


def listening_error(address: Address, error: OSError) -> ConfigError:
    """An error that says why the server can't listen on an address, and what to do."""
    match error.errno:
        case errno.EADDRINUSE:
            why = "the port is taken; stop what listens there, or choose another port"
        case errno.EADDRNOTAVAIL:
            why = f"{address.host} is no address of this machine"
        case errno.EACCES | errno.EPERM if address.port < PRIVILEGED:
            why = f"ports below {PRIVILEGED} need a privilege; choose another port"
        case _:
            why = error.strerror or str(error)
    return ConfigError(address.flag, f"can't listen on {address}: {why}")


def _bound(address: Address, wanted: Address) -> socket.socket:
    """A socket that holds the port without listening, so that no connection waits on it."""
    # First without SO_REUSEADDR, which keeps everybody else out. Lingering connections of a server that has
    # just ended can prevent that, but not the second try, with the option that the servers use themselves.
    for reuse in (False, True):
        holder = socket.socket(_family(address.host), socket.SOCK_STREAM)
        try:
            if holder.family == socket.AF_INET6:
                holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
            holder.bind(_target(address))
        except OSError as error:
            holder.close()
            if not reuse and error.errno == errno.EADDRINUSE:
                continue
            raise listening_error(wanted, error) from error
        return holder
    raise AssertionError("the second try returns or raises")


def _target(address: Address) -> tuple[str, int]:
    return (address.host, address.port)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _is_ipv6(host: str) -> bool:
    try:
        return isinstance(ipaddress.ip_address(host), ipaddress.IPv6Address)
    except ValueError:
        return False


def _is_own(host: str) -> bool:
    """Whether this machine has the address. Any other obstacle shows when the port is bound."""
    try:
        with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
    except OSError as error:
        return error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    return True


def _overlap(one: Address, other: Address) -> bool:
    """Whether two numeric addresses can't both be listened on. gRPC's 0.0.0.0 covers IPv6 too."""
    if not one.port or one.port != other.port:
        return False
    return one.host == other.host or any(
        ipaddress.ip_address(address.host).is_unspecified for address in (one, other)
    )
