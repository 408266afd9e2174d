"""The endpoint that Prometheus scrapes, and what strangers may do to it."""

from __future__ import annotations

import gzip
import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from polygraft.errors import ConfigError
from polygraft.telemetry import endpoint as module
from polygraft.telemetry.endpoint import MetricsEndpoint
from polygraft.telemetry.metrics import Metrics
from polygraft.telemetry.probes import STALLED_SECONDS, Probes


def opened(address: str, probes: Probes | None = None) -> MetricsEndpoint:
    return MetricsEndpoint(Metrics().registry, address, probes or Probes())


@pytest.fixture
def endpoint() -> Iterator[MetricsEndpoint]:
    with opened("127.0.0.1:0") as endpoint:
        yield endpoint


def ask(
    endpoint: MetricsEndpoint, method: str = "GET", path: str = "/metrics", **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", endpoint.port, timeout=30)
    connection.request(
        method, path, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )
    response = connection.getresponse()
    return response, response.read()


def raw(endpoint: MetricsEndpoint, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=30) as connection:
        connection.sendall(data)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


def test_it_serves_the_registry_until_closed() -> None:
    with opened("127.0.0.1:0") as endpoint:
        response, page = ask(endpoint)
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        assert b"polygraft_running_requests 0.0" in page
        assert b"process_resident_memory_bytes" in page
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", endpoint.port))
    with opened(f"127.0.0.1:{endpoint.port}"):
        pass


def test_what_a_scraper_may_ask_for(endpoint: MetricsEndpoint) -> None:
    response, page = ask(endpoint, Accept="application/openmetrics-text; version=1.0.0")
    assert response.headers["Content-Type"].startswith("application/openmetrics-text")
    assert page.endswith(b"# EOF\n")
    response, page = ask(endpoint, Accept_Encoding="gzip")
    assert response.headers["Content-Encoding"] == "gzip"
    assert b"polygraft_running_requests" in gzip.decompress(page)
    _, page = ask(endpoint, path="/metrics?name[]=polygraft_running_requests")
    assert b"polygraft_running_requests" in page
    assert b"polygraft_waiting_requests" not in page
    response, page = ask(endpoint, "HEAD")
    assert (response.status, page) == (200, b"")
    assert int(response.headers["Content-Length"]) > 1000


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/metrics/../x", 404),
        ("GET", "/healthz/", 404),
        ("GET", "/health", 404),
        ("POST", "/readyz", 405),
        ("POST", "/metrics", 405),
        ("DELETE", "/metrics", 405),
    ],
)
def test_nothing_else_is_there(endpoint: MetricsEndpoint, method: str, path: str, status: int) -> None:
    assert ask(endpoint, method, path)[0].status == status


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/2\r\n\r\n", b"400"),
        (b"GET http://[ HTTP/1.1\r\n\r\n", b"400"),
        (b"\xff\xfe \x00 HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 1000 + b"\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\nA: " + b"b" * 20_000 + b"\r\n\r\n", b"431"),
    ],
)
def test_garbage_is_refused(endpoint: MetricsEndpoint, data: bytes, status: bytes) -> None:
    assert raw(endpoint, data).split(b" ")[1] == status
    assert ask(endpoint)[0].status == 200


def test_idle_connections_cost_no_threads_and_keep_nobody_out(endpoint: MetricsEndpoint) -> None:
    before = threading.active_count()
    with ExitStack() as stack:
        idle = [
            stack.enter_context(socket.create_connection(("127.0.0.1", endpoint.port), timeout=30))
            for _ in range(200)
        ]
        assert ask(endpoint)[0].status == 200
        assert threading.active_count() == before
        # The oldest had to give way.
        with pytest.raises(ConnectionResetError):
            if not idle[0].recv(1):
                raise ConnectionResetError
        assert len(endpoint._connections) <= module.CONNECTIONS


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\n"])
def test_a_request_that_never_ends(
    endpoint: MetricsEndpoint, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(module, "REQUEST_SECONDS", 0.05)
    assert b" 408 " in raw(endpoint, sent)


def test_an_answer_that_nobody_reads(endpoint: MetricsEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(
        module, "choose_encoder", lambda accept: (lambda registry: bytes(2**26), "text/plain")
    )
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=30) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        connection.recv(1)
        deadline = threading.Event()
        while endpoint._connections and not deadline.wait(0.02):
            pass
    assert not endpoint._connections


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:x", "203.0.113.1:0", "no.such.host.invalid:0"])
def test_an_impossible_address_names_the_flag(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(address)
    assert caught.value.flag == "--metrics"


def test_a_taken_port_names_the_flag() -> None:
    with opened("127.0.0.1:0") as first, pytest.raises(ConfigError) as caught:
        opened(f"127.0.0.1:{first.port}")
    assert caught.value.flag == "--metrics"


def test_closing_twice_is_harmless() -> None:
    endpoint = opened("127.0.0.1:0")
    endpoint.close()
    endpoint.close()


def test_probes_tell_starting_serving_draining_and_dead_apart() -> None:
    now = [0.0]
    probes = Probes(lambda: now[0])

    with opened("127.0.0.1:0", probes) as endpoint:

        def told() -> list[tuple[int, str]]:
            answers = [ask(endpoint, path=path) for path in ("/healthz", "/readyz")]
            return [(response.status, body.decode().strip()) for response, body in answers]

        assert told() == [(200, "ok"), (503, "starting: the base model is being loaded")]
        probes.beat()
        probes.ready()
        assert told() == [(200, "ok"), (200, "ok")]
        assert ask(endpoint, "HEAD", "/readyz")[1] == b""
        probes.unready("draining")
        assert told() == [(200, "ok"), (503, "draining")]
        now[0] = STALLED_SECONDS + 2
        assert told() == [(503, f"the event loop has not run for {now[0]:.0f} s")] * 2
        probes.rest()
        assert told() == [(200, "ok"), (503, "draining")]
        probes.dead("the engine failed")
        assert told() == [(503, "the engine failed")] * 2
