"""What the demo reads from the metrics endpoint."""

from __future__ import annotations

import http.client
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

SCRAPE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Scrape:
    """Two facts about a server.

    Args:
        widest_step: distinct adapters by kind in the step that most shared; the base counts as one.
        resident_bytes: physical memory of the process.
    """

    widest_step: dict[str, int]
    resident_bytes: int


def scrape(address: str) -> Scrape:
    """Read the metrics endpoint at HOST:PORT; raises OSError."""
    return parse(fetch(address))


def fetch(address: str) -> str:
    """What the metrics endpoint at HOST:PORT answers; raises OSError."""
    # http.client and not urllib: a proxy of the environment can't lead to this machine itself
    connection = http.client.HTTPConnection(address, timeout=SCRAPE_SECONDS)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def parse(text: str) -> Scrape:
    """Read the exposition format."""
    widest: dict[str, int] = {}
    resident = 0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "polygraft_widest_step_adapters":
                widest[sample.labels["kind"]] = int(sample.value)
            elif sample.name == "process_resident_memory_bytes":
                resident = int(sample.value)
    return Scrape(widest, resident)
