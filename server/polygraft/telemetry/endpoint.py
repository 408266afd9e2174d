"""The HTTP endpoint that Prometheus scrapes."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry, start_http_server

from polygraft.config import split_host_port
from polygraft.errors import ConfigError


class MetricsEndpoint:
    """Serves a registry at `http://HOST:PORT/metrics` from a thread of its own until closed.

    Args:
        registry: what to serve.
        address: HOST:PORT as given to `--metrics`; port 0 picks one.

    Raises:
        ConfigError: the address is malformed, taken, or not this machine's.
    """

    def __init__(self, registry: CollectorRegistry, address: str) -> None:
        host, port = split_host_port("--metrics", address)
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise ConfigError("--metrics", f"can't listen on {address}: {error.strerror or error}") from error
        self.port = int(self._server.server_port)

    def close(self) -> None:
        """Stop serving and free the port; closing twice is harmless."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
