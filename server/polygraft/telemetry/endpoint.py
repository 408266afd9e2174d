"""The HTTP endpoint that Prometheus scrapes and Kubernetes probes.

Anyone who can reach it may connect, so the cost of connections is bounded: one thread serves them all, each
gets a few seconds for one request, and a new one beyond the limit closes the oldest.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import io
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from polygraft.addresses import Address, listening_error
from polygraft.telemetry.probes import Probes

METRICS = "/metrics"
HEALTH = "/healthz"
READINESS = "/readyz"
CONNECTIONS = 32
"""At a time; a scraper needs one or two."""

REQUEST_BYTES = 8192
REQUEST_SECONDS = 5.0
"""From the connection to the end of the request's headers."""

ANSWER_SECONDS = 10.0
"""How long the other side may take to read the answer."""


class MetricsEndpoint:
    """Serves `/metrics`, `/healthz` and `/readyz` over HTTP from a thread of its own until closed.

    The probes answer 200, or 503 with the reason. `/healthz` fails if the process should be restarted,
    `/readyz` if it should get no requests: while it starts or drains as well.

    Args:
        registry: the metrics.
        address: HOST:PORT as given to `--metrics`; port 0 picks one.

    Raises:
        ConfigError: the address is malformed, taken, or not this machine's.
    """

    def __init__(self, registry: CollectorRegistry, address: str, probes: Probes) -> None:
        self._registry = registry
        self._probes = probes
        self._wanted = Address.parse("--metrics", address)
        self._hosts = self._wanted.resolve()
        self._connections: dict[asyncio.Task[None], None] = {}  # the oldest first
        started: Future[int] = Future()
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(
            target=self._run, args=(started,), name="metrics endpoint", daemon=True
        )
        self._thread.start()
        self.port = started.result()

    def close(self) -> None:
        """Stop serving and free the port; closing twice is harmless."""
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, started: Future[int]) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve(started))

    async def _serve(self, started: Future[int]) -> None:
        servers: list[asyncio.Server] = []
        try:
            port = self._wanted.port
            for host in self._hosts:
                server = await asyncio.start_server(
                    self._connected, host.host, port, limit=REQUEST_BYTES, reuse_address=True
                )
                servers.append(server)
                port = server.sockets[0].getsockname()[1]
        except OSError as error:
            for server in servers:
                server.close()
            started.set_exception(listening_error(self._wanted, error))
            return
        started.set_result(port)
        await self._closing.wait()
        for server in servers:
            server.close()
        for connection in list(self._connections):
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= CONNECTIONS:
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            oldest.cancel()
        self._connections[task] = None
        try:
            answer = await self._answer(reader)
            async with asyncio.timeout(ANSWER_SECONDS):
                writer.write(answer)
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError, asyncio.CancelledError):
            pass  # cancelled by a later connection or by closing; either way nobody waits for this task
        finally:
            writer.transport.abort()  # does nothing if it is closed
            self._connections.pop(task, None)

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
        except TimeoutError:
            return _refusal(HTTPStatus.REQUEST_TIMEOUT)
        except asyncio.LimitOverrunError:
            return _refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        except asyncio.IncompleteReadError:
            return b""
        request = _Request.parse(head)
        if request is None:
            return _refusal(HTTPStatus.BAD_REQUEST)
        if request.path not in (METRICS, HEALTH, READINESS):
            return _refusal(HTTPStatus.NOT_FOUND)
        if request.method not in ("GET", "HEAD"):
            return _refusal(HTTPStatus.METHOD_NOT_ALLOWED, "Allow: GET, HEAD")
        if request.path == HEALTH:
            return _probe(self._probes.unhealthy_because(), request)
        if request.path == READINESS:
            return _probe(self._probes.unready_because(), request)
        return self._metrics(request)

    def _metrics(self, request: _Request) -> bytes:
        encode, content_type = choose_encoder(request.accept)
        registry = self._registry.restricted_registry(request.names) if request.names else self._registry
        body = encode(registry)
        headers = [f"Content-Type: {content_type}"]
        if request.takes_gzip:
            body = gzip.compress(body, compresslevel=1)
            headers.append("Content-Encoding: gzip")
        return _response(HTTPStatus.OK, headers, body, with_body=request.method == "GET")


@dataclass(frozen=True, slots=True)
class _Request:
    """The parts of a request that matter here.

    Args:
        names: the metrics that `name[]` asks for; empty for all.
    """

    method: str
    path: str
    names: tuple[str, ...]
    accept: str
    takes_gzip: bool

    @classmethod
    def parse(cls, head: bytes) -> Self | None:
        """Parse the request line and the headers; None if they are malformed."""
        line, _, rest = head.partition(b"\r\n")
        try:
            method, target, version = line.decode("ascii").split(" ")
            headers = http.client.parse_headers(io.BytesIO(rest))
            url = urlsplit(target)
        except (ValueError, http.client.HTTPException):
            return None
        if not version.startswith("HTTP/1."):
            return None
        names = tuple(parse_qs(url.query).get("name[]", ()))
        takes_gzip = "gzip" in headers.get("Accept-Encoding", "")
        return cls(method, url.path, names, headers.get("Accept", ""), takes_gzip)


def _probe(problem: str | None, request: _Request) -> bytes:
    status = HTTPStatus.OK if problem is None else HTTPStatus.SERVICE_UNAVAILABLE
    headers = ["Content-Type: text/plain; charset=utf-8", "Cache-Control: no-store"]
    return _response(status, headers, f"{problem or 'ok'}\n".encode(), with_body=request.method == "GET")


def _refusal(status: HTTPStatus, *headers: str) -> bytes:
    text = f"{status.value} {status.phrase}; served here: {METRICS}, {HEALTH}, {READINESS}\n".encode()
    return _response(status, ["Content-Type: text/plain; charset=utf-8", *headers], text)


def _response(status: HTTPStatus, headers: list[str], body: bytes, *, with_body: bool = True) -> bytes:
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        *headers,
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body if with_body else b"")
