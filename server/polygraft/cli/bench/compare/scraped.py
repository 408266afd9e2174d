"""What a server's metrics tell of a run: steps by path, switches, memory."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from polygraft.cli.demo.scrape import fetch


@dataclass(frozen=True, slots=True)
class Counts:
    """Counters since the server's start, and its memory now."""

    steps: int = 0
    merged_steps: int = 0
    switches: int = 0
    resident_bytes: int = 0

    def since(self, before: Counts) -> Counts:
        """What came about after an earlier reading."""
        return Counts(
            self.steps - before.steps,
            self.merged_steps - before.merged_steps,
            self.switches - before.switches,
            self.resident_bytes,
        )


def read(address: str) -> Counts | None:
    """Read the metrics endpoint at HOST:PORT; None if there is no address. Raises OSError."""
    if not address:
        return None
    steps = merged = switches = resident = 0.0
    for family in text_string_to_metric_families(fetch(address)):
        for sample in family.samples:
            if sample.name == "polygraft_steps_total":
                steps += sample.value
                merged += sample.value if sample.labels["path"] == "MERGED" else 0
            elif sample.name == "polygraft_path_switches_total":
                switches = sample.value
            elif sample.name == "process_resident_memory_bytes":
                resident = sample.value
    return Counts(int(steps), int(merged), int(switches), int(resident))
