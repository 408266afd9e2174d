"""Addresses are read, looked up and tried; what is wrong is said precisely, by its flag."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest

from polygraft.addresses import Address, Reservation, listening_error
from polygraft.errors import ConfigError


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


IPV6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def refusal(settings: dict[str, str]) -> ConfigError:
    with pytest.raises(ConfigError) as caught, Reservation(settings):
        pass
    return caught.value


@pytest.mark.parametrize(
    ("text", "host", "port", "shown"),
    [
        ("127.0.0.1:50051", "127.0.0.1", 50051, "127.0.0.1:50051"),
        ("localhost:0", "localhost", 0, "localhost:0"),
        ("[::1]:50051", "::1", 50051, "[::1]:50051"),
        ("::1:50051", "::1", 50051, "[::1]:50051"),
        (":::80", "::", 80, "[::]:80"),
        ("2001:db8::8:80", "2001:db8::8", 80, "[2001:db8::8]:80"),
        (" 0.0.0.0:9464\n", "0.0.0.0", 9464, "0.0.0.0:9464"),
        ("my-host.example:65535", "my-host.example", 65535, "my-host.example:65535"),
    ],
)
def test_reading(text: str, host: str, port: int, shown: str) -> None:
    address = Address.parse("--listen", text)
    assert (address.host, address.port, str(address)) == (host, port, shown)
    assert Address.parse("--listen", str(address)) == address


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nowhere", "expected HOST:PORT, got 'nowhere'"),
        (":50051", "expected HOST:PORT, got ':50051'; every address of this machine is 0.0.0.0 or [::]"),
        ("127.0.0.1:", "expected HOST:PORT"),
        ("127.0.0.1:http", "expected HOST:PORT"),
        ("127.0.0.1:-1", "expected HOST:PORT"),
        ("127.0.0.1:٨٠", "expected HOST:PORT"),
        ("127.0.0.1:65536", "port 65536 is more than 65535"),
        ("::1", "':' isn't an IPv6 address; the port follows the last colon"),
        ("fe80::1", "'fe80:' isn't an IPv6 address"),
        ("[127.0.0.1]:80", "'127.0.0.1' in brackets isn't an IPv6 address"),
        ("http://localhost:80", "'http://localhost' isn't an IPv6 address"),
        ("unix:/tmp/x:1", "isn't an IPv6 address"),
        ("my host:80", "'my host' isn't a host"),
    ],
)
def test_what_is_no_address(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Address.parse("--listen", text)
    assert str(caught.value).startswith("--listen: ")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("localhost", True),
        ("127.0.0.9", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("me", False),
    ],
)
def test_what_only_this_machine_reaches(host: str, is_loopback: bool) -> None:
    assert Address("--listen", host, 1).is_loopback is is_loopback


@pytest.mark.parametrize("flag", ["--listen", "--metrics"])
def test_a_taken_port(flag: str, taken: int) -> None:
    error = refusal({"--listen": "127.0.0.1:0", "--metrics": "127.0.0.1:0", flag: f"127.0.0.1:{taken}"})
    assert error.flag == flag
    assert f"can't listen on 127.0.0.1:{taken}: the port is taken" in str(error)


@pytest.mark.parametrize("address", ["203.0.113.1:0", "203.0.113.1:80", "[2001:db8::1]:80"])
def test_not_this_machines(address: str) -> None:
    assert "is no address of this machine" in str(refusal({"--listen": address}))


def test_a_name_that_nobody_knows() -> None:
    assert "can't resolve 'no.such.host.invalid'" in str(refusal({"--listen": "no.such.host.invalid:80"}))
    assert "can't resolve" in str(refusal({"--listen": f"{'a' * 300}:80"}))


@pytest.mark.parametrize("other", ["127.0.0.1:{}", "localhost:{}", "0.0.0.0:{}"])
def test_one_port_for_both(other: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    error = refusal({"--listen": f"127.0.0.1:{port}", "--metrics": other.format(port)})
    assert error.flag == "--metrics"
    assert "is --listen's as well: each needs a port of its own" in str(error)


@IPV6
def test_two_hosts_may_have_the_same_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with Reservation({"--listen": f"127.0.0.1:{port}", "--metrics": f"[::1]:{port}"}):
        pass


@IPV6
def test_all_addresses_of_a_name_count(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("203.0.113.1", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    assert [address.host for address in Address("--listen", "both", 0).resolve()] == ["127.0.0.1", "::1"]


def test_a_reserved_port_is_kept_from_others_and_given_back(taken: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with Reservation({"--listen": f"127.0.0.1:{port}"}):
        # Nobody's connection waits for a server that isn't there yet.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        assert "taken" in str(refusal({"--listen": f"127.0.0.1:{port}"}))
    # An error gives back what was reserved before it.
    refusal({"--listen": f"127.0.0.1:{port}", "--metrics": f"127.0.0.1:{taken}"})
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_connections_of_a_server_that_has_ended_dont_matter() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            accepted.close()  # the side that closes first keeps the port in TIME_WAIT
            client.recv(1)
    with Reservation({"--listen": f"127.0.0.1:{port}"}):
        pass


@pytest.mark.parametrize(
    ("port", "number", "says"),
    [
        (80, errno.EACCES, "ports below 1024 need a privilege; choose another port"),
        (8080, errno.EACCES, "Permission denied"),
        (80, errno.EADDRNOTAVAIL, "127.0.0.1 is no address of this machine"),
    ],
)
def test_the_reason(port: int, number: int, says: str) -> None:
    address = Address("--listen", "127.0.0.1", port)
    error = listening_error(address, OSError(number, "Permission denied"))
    assert str(error) == f"--listen: can't listen on {address}: {says}"
