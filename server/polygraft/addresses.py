"""Where the server listens: addresses are read, looked up and tried before anything slow begins."""

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
"""What turns the metrics endpoint off, in place of an address."""

PRIVILEGED = 1024
"""Ports below it need a privilege."""


@dataclass(frozen=True, slots=True)
class Address:
    """HOST:PORT as it was given; port 0 lets the system choose one.

    Args:
        flag: the setting that it comes from, for errors.
        host: a name, or an IPv4 or IPv6 address without brackets.
    """

    flag: str
    host: str
    port: int

    @classmethod
    def parse(cls, flag: str, text: str) -> Self:
        """Read HOST:PORT. The port follows the last colon, so an IPv6 host may do without brackets.

        Raises:
            ConfigError: it isn't of that form.
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
        """The same host with the port that the system chose."""
        return Address(self.flag, self.host, port)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it; a name other than localhost may lead anywhere."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def resolve(self) -> list[Address]:
        """The numeric addresses that the host stands for and that this machine has, at least one.

        Raises:
            ConfigError: the name can't be resolved, or none of its addresses is this machine's.
        """
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except (OSError, UnicodeError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(self.flag, f"can't resolve {self.host!r}: {why}") from error
        # "localhost" often has an IPv6 address where the machine has no IPv6.
        hosts = [host for host in dict.fromkeys(str(target[0]) for *_, target in found) if _is_own(host)]
        if not hosts:
            raise ConfigError(self.flag, f"can't listen on {self}: {self.host} is no address of this machine")
        return [Address(self.flag, host, self.port) for host in hosts]


class Reservation:
    """Ports that are kept from other processes until the servers themselves listen on them.

    A port 0 isn't kept, since the system chooses one later.

    Raises:
        ConfigError: an address is malformed, unknown, not this machine's, taken, not allowed, or the same as
            another's.
    """

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._sockets: list[socket.socket] = []
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
                    self._sockets.append(_bound(address, wanted))
                held += found
        except ConfigError:
            self.release()
            raise

    def release(self) -> None:
        """Let go of the ports; whoever listens on them does it at once."""
        while self._sockets:
            self._sockets.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def listening_error(address: Address, error: OSError) -> ConfigError:
    """Say precisely why an address can't be listened on, and what to do."""
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
    """A socket that holds the port, without listening: nobody's connection is to wait for it."""
    # First in a way that leaves it to nobody else; connections of a server that has just ended may stand
    # against that, but not against the second way, which is the servers' own.
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
    raise AssertionError("the second way returns or raises")


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
    """Whether this machine has the address; other reasons not to get it are for whoever binds the port."""
    try:
        with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
    except OSError as error:
        return error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    return True


def _overlap(one: Address, other: Address) -> bool:
    """Whether two numeric addresses can't both be listened on; gRPC's 0.0.0.0 is IPv6's too."""
    if not one.port or one.port != other.port:
        return False
    return one.host == other.host or any(
        ipaddress.ip_address(address.host).is_unspecified for address in (one, other)
    )
