"""What a real Prometheus says of a server agrees with what the server's clients saw.

The server runs in a process of its own on a tiny model, with an adapter of every kind and a broken one. Its
clients send two bursts, bad calls between them and changes of the registry; then everything is asked of Prometheus.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import pytest

from polygraft.cli.demo.launcher import ServerProcess, serve_command
from polygraft_client import Adapter, Client
from tests.deploy.files import Query, queries, tool
from tests.e2e.mixed_load import (
    LONG_TOKENS,
    Seen,
    by_the_merged_path,
    counted,
    first_burst,
    of_adapter,
    second_burst,
    send,
    send_bad,
)
from tests.e2e.prometheus import Prometheus, Vector, settle
from tests.peft_folders import COMMON

GONE = "lora-head"
LEFT = 'polygraft_requests_total{finish_reason="CANCELLED"} or polygraft_errors_total{code="CANCELLED"}'
WINDOW = "1m"  # for ranges of the dashboard's queries: longer than the test


@dataclass(frozen=True, slots=True)
class Watched:
    """What there is to compare. `settled` are moments by which Prometheus knew all that had happened:
    before the first burst, after it, after the second.
    """

    prometheus: Prometheus
    settled: tuple[float, float, float]
    first: list[Seen]
    second: list[Seen]
    refused: Counter[str]
    adapters: list[Adapter]

    @property
    def seen(self) -> list[Seen]:
        return [*self.first, *self.second]

    def query(self, expression: str, *labels: str) -> Vector:
        return self.prometheus.query(expression, *labels, at=self.settled[2])

    def value(self, expression: str) -> float:
        return self.prometheus.value(expression, at=self.settled[2])


@pytest.fixture(scope="module")
def watched(
    tiny_model: Callable[[str], Path],
    common_store: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Watched]:
    tool("prometheus")  # before the server is started for nothing
    folder = tmp_path_factory.mktemp("prometheus")
    store = tmp_path_factory.mktemp("watched") / "store"
    shutil.copytree(common_store("llama"), store)
    (store / "broken").mkdir()
    (store / "broken" / "adapter_config.json").write_text("{")
    command = serve_command(
        "--model", str(tiny_model("llama")), "--adapters", str(store), "--kv-cache-bytes", "8MiB", "--threads", "1"
    )  # fmt: skip
    with ServerProcess(command) as server:
        addresses = server.wait_ready(120, report=lambda line: None)
        with Prometheus(addresses.metrics, folder) as prometheus, Client(addresses.grpc) as client:
            ready = [adapter for adapter in client.adapters.list() if adapter.state == "READY"]
            before = prometheus.wait_scraped()
            first = send(addresses.grpc, first_burst(ready))
            refused = send_bad(addresses.grpc)
            between = prometheus.wait_scraped()
            client.adapters.load("again", "lora-regex")
            client.adapters.unload(GONE)
            stayed = [adapter for adapter in client.adapters.list() if adapter.state == "READY"]
            second = send(addresses.grpc, [*second_burst(stayed, first), *by_the_merged_path(stayed)])
            # The server learns that a client has left when the client is gone already.
            settle("everybody has left", lambda: len(prometheus.query(LEFT)) == 2)
            after = prometheus.wait_scraped()
            yield Watched(
                prometheus, (before, between, after), first, second, refused, list(client.adapters.list())
            )
        server.stop()


def still_there(watched: Watched) -> list[Seen]:
    """Requests of adapters that weren't unloaded: the others' series are gone."""
    names = {"", *(adapter.name for adapter in watched.adapters)}
    return [seen for seen in watched.seen if seen.ask.adapter in names]


def test_the_load_is_mixed(watched: Watched) -> None:
    served = {adapter.kind for adapter in watched.adapters if adapter.state == "READY"}
    assert {seen.ask.kind for seen in watched.seen} == {"base", *served}
    assert len(served) > 10
    reasons = {seen.finish_reason for seen in watched.second}
    assert reasons == {"LENGTH", "STOP", "STOP_SEQUENCE", "TIME_LIMIT", "CANCELLED"}
    assert watched.refused == {"NOT_FOUND": 2, "INVALID_ARGUMENT": 2}


def test_requests(watched: Watched) -> None:
    labels = ("adapter", "kind", "finish_reason")
    expected = counted(still_there(watched), lambda s: (*of_adapter(s), s.finish_reason), lambda s: 1)
    assert watched.query(f"sum by ({', '.join(labels)}) (polygraft_requests_total)", *labels) == expected
    submitted = counted(still_there(watched), of_adapter, lambda s: 1)
    assert watched.query("polygraft_submitted_requests_total", "adapter", "kind") == submitted
    paths = counted(
        (s for s in still_there(watched) if s.answer), lambda s: (*of_adapter(s), s.path), lambda s: 1
    )
    told = 'sum by (adapter, kind, path) (polygraft_requests_total{finish_reason!="CANCELLED"})'
    assert watched.query(told, "adapter", "kind", "path") == paths


def test_an_unloaded_adapters_series_are_gone_and_were_there(watched: Watched) -> None:
    requests = f'sum (polygraft_requests_total{{adapter="{GONE}"}})'
    assert watched.query(requests) == {}
    sent = [seen for seen in watched.first if seen.ask.adapter == GONE]
    assert watched.prometheus.value(requests, at=watched.settled[1]) == len(sent) > 0


@pytest.mark.parametrize(
    ("metric", "field"),
    [
        ("prompt", "prompt_tokens"),
        ("cached", "cached_tokens"),
        ("virtual", "virtual_tokens"),
        ("generated", "completion_tokens"),
    ],
)
def test_tokens(watched: Watched, metric: str, field: str) -> None:
    seen = still_there(watched)
    told = counted((s for s in seen if s.answer), of_adapter, attrgetter(f"answer.usage.{field}"))
    found = watched.query(f"polygraft_{metric}_tokens_total", "adapter", "kind")
    # Who leaves isn't told what it had; the server may have gone a few steps further.
    left = {of_adapter(s) for s in seen if s.answer is None}
    assert all(found[key] >= told[key] for key in left)
    assert {key: found[key] for key in found.keys() - left} == {key: told[key] for key in told.keys() - left}


def test_time_to_first_token(watched: Watched) -> None:
    metric = "polygraft_time_to_first_token_seconds"
    seen = [s for s in watched.seen if s.tokens]
    counts = counted(seen, lambda s: (s.ask.kind,), lambda s: 1)
    assert watched.query(f"sum by (kind) ({metric}_count)", "kind") == counts
    # A client starts before its request has arrived and gets a token after it has left, so the server's times are
    # shorter, request by request: no bucket can hold fewer of them than of the clients'.
    buckets = watched.query(f"sum by (kind, le) ({metric}_bucket)", "kind", "le")
    assert len(buckets) > len(counts)
    for (kind, bound), count in buckets.items():
        assert count >= sum(s.ask.kind == kind and s.seconds_to_first_token <= float(bound) for s in seen)
    for (kind,), total in watched.query(f"sum by (kind) ({metric}_sum)", "kind").items():
        own = [s for s in seen if s.ask.kind == kind]
        told = sum(s.answer.timings.time_to_first_token for s in own if s.answer)
        # Answers tell times in nanoseconds.
        assert told - 1e-6 <= total <= sum(s.seconds_to_first_token for s in own)
        if all(s.answer for s in own):
            assert math.isclose(total, told, abs_tol=1e-6)


def test_steps_by_path(watched: Watched) -> None:
    steps = {
        path: count for (path,), count in watched.query("polygraft_steps_total", "path").items() if count
    }
    assert set(steps) == {seen.path for seen in watched.seen if seen.answer}
    assert watched.value("sum (polygraft_step_seconds_count)") == sum(steps.values())
    longest = max(seen.tokens for seen in watched.first) + max(seen.tokens for seen in watched.second)
    assert longest <= sum(steps.values()) <= sum(seen.tokens for seen in watched.seen)


def test_rows(watched: Watched) -> None:
    """Whatever shared a step: the rows of the first burst are what its answers took, to the row."""
    before, between, _ = watched.settled
    rows = "sum (polygraft_step_rows_sum) or vector(0)"
    ran = watched.prometheus.value(rows, at=between) - watched.prometheus.value(rows, at=before)
    assert ran == sum(seen.computed_rows for seen in watched.first)


def test_distinct_adapters_in_a_step(watched: Watched) -> None:
    long = [seen for seen in watched.second if seen.ask.options.get("max_new_tokens") == LONG_TOKENS]
    assert max(seen.first_token for seen in long) < min(seen.end for seen in long), (
        "they weren't served together"
    )
    kinds = Counter(seen.ask.kind for seen in long)
    widest = watched.query("polygraft_widest_step_adapters", "kind")
    assert widest == {(kind,): count for kind, count in kinds.items()}
    # The histogram leaves the base out.
    distinct = kinds.total() - kinds["base"]
    buckets = {
        float(bound): count
        for (bound,), count in watched.query("polygraft_step_adapters_bucket", "le").items()
    }
    enough = min(bound for bound in buckets if bound >= distinct)
    too_few = max(bound for bound in buckets if bound < distinct)
    assert buckets[enough] == buckets[math.inf]
    assert buckets[too_few] < buckets[enough]
    assert distinct > 8


def test_resident_adapters(watched: Watched) -> None:
    states = Counter(str(adapter.state) for adapter in watched.adapters)
    assert states == {"READY": len(COMMON), "FAILED": 1}  # one was loaded a second time, one unloaded
    found = watched.query("polygraft_adapters", "state")
    assert found == {(state,): states[state] for state in ("LOADING", "READY", "FAILED", "UNLOADING")}
    assert watched.value("polygraft_adapter_compiled_bytes") == sum(
        a.compiled_bytes for a in watched.adapters
    )
    # The broken folder failed at start; the call that tried it again was refused before it became a load.
    assert watched.query("polygraft_adapter_loads_total", "result") == {
        ("ok",): len(COMMON) + 1,
        ("failed",): 1,
    }
    assert watched.value("polygraft_adapter_unloads_total") == 1


def test_errors(watched: Watched) -> None:
    left = sum(seen.answer is None for seen in watched.seen)
    codes = {(code,): count for code, count in watched.refused.items()} | {("CANCELLED",): left}
    assert watched.query("sum by (code) (polygraft_errors_total)", "code") == codes


def test_merges(watched: Watched) -> None:
    merged = {seen.ask.adapter for seen in watched.seen if seen.path == "MERGED"}
    assert merged
    # An adapter whose copy had to give way is merged again.
    merges = watched.value('polygraft_merges_total{result="ok"}')
    assert merges >= len(merged)
    assert merges == watched.value("polygraft_merge_seconds_count")
    assert watched.value('polygraft_merges_total{result="failed"}') == 0
    assert 0 < watched.value("polygraft_merged_copies") <= merges
    assert 0 < watched.value("polygraft_merged_bytes") <= watched.value("polygraft_merged_capacity_bytes")


@pytest.mark.parametrize("query", queries(), ids=lambda query: query.panel)
def test_every_query_of_the_dashboard_returns_data(watched: Watched, query: Query) -> None:
    values = watched.query(query.at(WINDOW)).values()
    assert any(math.isfinite(value) for value in values), (query, values)


def test_the_alerts_are_healthy_and_one_fires(watched: Watched) -> None:
    rules = {rule["name"]: rule for rule in watched.prometheus.rules()}
    assert {rule["health"] for rule in rules.values()} == {"ok"}
    assert rules["PolygraftAdapterLoadsFailing"]["state"] == "firing"
    assert rules["PolygraftAdaptersFailed"]["state"] == "pending"  # for a minute
    for quiet in (
        "PolygraftDown",
        "PolygraftEngineStalled",
        "PolygraftQueueGrowing",
        "PolygraftInternalErrors",
    ):
        assert rules[quiet]["state"] == "inactive", rules[quiet]
