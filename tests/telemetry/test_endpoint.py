from __future__ import annotations

import http.client
import socket

import pytest

from polygraft.errors import ConfigError
from polygraft.telemetry.endpoint import MetricsEndpoint
from polygraft.telemetry.metrics import Metrics


def test_it_serves_the_registry_until_closed() -> None:
    with MetricsEndpoint(Metrics().registry, "127.0.0.1:0") as endpoint:
        connection = http.client.HTTPConnection("127.0.0.1", endpoint.port)
        connection.request("GET", "/metrics")
        page = connection.getresponse().read().decode()
        assert "polygraft_running_requests 0.0" in page
        assert "process_resident_memory_bytes" in page
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", endpoint.port))
    with MetricsEndpoint(Metrics().registry, f"127.0.0.1:{endpoint.port}"):
        pass


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:x", "203.0.113.1:0", "no.such.host.invalid:0"])
def test_an_impossible_address_names_the_flag(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MetricsEndpoint(Metrics().registry, address)
    assert caught.value.flag == "--metrics"


def test_a_taken_port_names_the_flag() -> None:
    with MetricsEndpoint(Metrics().registry, "127.0.0.1:0") as first, pytest.raises(ConfigError) as caught:
        MetricsEndpoint(Metrics().registry, f"127.0.0.1:{first.port}")
    assert caught.value.flag == "--metrics"


def test_closing_twice_is_harmless() -> None:
    endpoint = MetricsEndpoint(Metrics().registry, "127.0.0.1:0")
    endpoint.close()
    endpoint.close()
