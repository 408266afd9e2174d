"""What the server tells Prometheus. `docs/guides/metrics.md` explains every metric."""

from __future__ import annotations

from collections import Counter as Tally

import prometheus_client
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)

from polygraft.engine.client import ModelInfo, Occupancy, StepStats
from polygraft.telemetry.labels import AdapterLabels
from polygraft_types.adapters import AdapterInfo, AdapterState, MergeEvent, MergeOutcome
from polygraft_types.answers import Finished
from polygraft_types.requests import LoraPath

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_INTER_TOKEN = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_END_TO_END = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_QUEUE = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60)
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_ROWS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_ADAPTERS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
_LOAD = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_WAIT = (0, 1, 2, 3, 4, 6, 8, 12, 16, 32)
_MERGE_RESULTS = {
    MergeOutcome.OK: "ok",
    MergeOutcome.FAILED: "failed",
    MergeOutcome.CANCELLED: "cancelled",
}

BASE_KIND = "base"
"""The kind label of the base model."""


class Metrics:
    """Turns what the engine and the RPC layer report into metrics, on a registry of its own.

    Implements `polygraft.engine.client.Observer` and `polygraft.rpc.interceptors.CallObserver`. An
    adapter's series vanish when it is unloaded.

    Args:
        max_adapter_labels: adapters that get series of their own, by first use; the rest share one.
    """

    def __init__(self, max_adapter_labels: int = 100) -> None:
        # Creation times double the number of series and nothing reads them.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._labels = AdapterLabels(max_adapter_labels)
        self._known: dict[str, AdapterInfo] = {}
        self._widest = (0, 0)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._define_requests()
        self._define_steps()
        self._define_adapters()
        self._define_merges()
        self._define_combinations()

    def _define_requests(self) -> None:
        own = ("adapter", "kind")
        self._model = self._gauge(
            "model_info",
            "1, labelled with the base model as it is served",
            ("model", "architecture", "dtype", "quantization", "device", "version"),
        )
        self._submitted = self._counter("submitted_requests", "Requests that entered the queue", own)
        self._requests = self._counter(
            "requests", "Requests that ended, by finish reason", (*own, "path", "finish_reason")
        )
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of finished requests", own)
        self._cached = self._counter("cached_tokens", "Prompt tokens whose keys and values were reused", own)
        self._virtual = self._counter(
            "virtual_tokens", "Virtual tokens that finished requests attended to", own
        )
        self._generated = self._counter("generated_tokens", "Tokens generated", own)
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token", _LATENCY, ("kind", "path")
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a request", _INTER_TOKEN, ("kind", "path")
        )
        self._end_to_end = self._histogram(
            "end_to_end_seconds", "From arrival to the end of a request", _END_TO_END, ("kind", "path")
        )
        self._queue = self._histogram(
            "queue_seconds", "From arrival to first being scheduled", _QUEUE, ("kind",)
        )
        self._running = self._gauge("running_requests", "Requests being served")
        self._waiting = self._gauge("waiting_requests", "Requests in the queue")
        self._calls = self._counter("rpcs", "RPCs that ended, by method", ("method",))
        self._errors = self._counter("errors", "RPCs that ended with an error", ("method", "code"))
        self._unread_streams = self._counter(
            "unread_streams", "Streams ended because nobody read them, by limit", ("limit",)
        )
        for limit in ("bytes", "time"):
            self._unread_streams.labels(limit)
        self._unread = self._gauge("unread_bytes", "Memory of unread output")

    def _define_steps(self) -> None:
        self._steps = self._counter("steps", "Engine steps, by the path of low-rank weights", ("path",))
        self._step_seconds = self._histogram("step_seconds", "Duration of a step", _STEP, ("path",))
        self._path_wait = self._histogram(
            "path_wait_steps", "Steps on other weights since the last ones of these", _WAIT, ("path",)
        )
        self._switches = self._counter("path_switches", "Steps on other weights than the one before")
        self._rows = self._histogram(
            "step_rows", "Tokens run through the base in a step, by phase", _ROWS, ("phase",)
        )
        self._step_adapters = self._histogram(
            "step_adapters", "Distinct adapters that shared a step, the base not counted", _ADAPTERS
        )
        self._widest_step = self._gauge(
            "widest_step_adapters",
            "Distinct adapters by kind in the step that most shared so far, the base counted as one",
            ("kind",),
        )
        self._preemptions = self._counter("preemptions", "Sequences that lost their place in the cache")
        self._blocks_used = self._gauge("kv_blocks_used", "Blocks of the KV cache in use")
        self._blocks_cached = self._gauge(
            "kv_blocks_cached", "Free blocks of the KV cache whose contents a prompt may find"
        )
        self._blocks = self._gauge("kv_blocks_capacity", "Blocks of the KV cache in all")
        self._prefill_rows = self._rows.labels("prefill")
        self._decode_rows = self._rows.labels("decode")

    def _define_adapters(self) -> None:
        self._adapters = self._gauge("adapters", "Registered adapters, by state", ("state",))
        for state in set(AdapterState) - {AdapterState.UNKNOWN}:
            self._adapters.labels(state.value).set(0)
        self._compiled = self._gauge("adapter_compiled_bytes", "Memory that compiled adapters take")
        self._loads = self._counter("adapter_loads", "Loads of adapters, by result", ("result",))
        for result in ("ok", "failed"):
            self._loads.labels(result)
        self._load_seconds = self._histogram("adapter_load_seconds", "Duration of a successful load", _LOAD)
        self._unloads = self._counter("adapter_unloads", "Adapters unloaded")
        self._per_adapter = (
            self._submitted,
            self._requests,
            self._prompt,
            self._cached,
            self._virtual,
            self._generated,
        )

    def _define_merges(self) -> None:
        self._merges = self._counter("merges", "Merged copies asked for, by what became of it", ("result",))
        for outcome in _MERGE_RESULTS.values():
            self._merges.labels(outcome)
        self._merge_seconds = self._histogram(
            "merge_seconds", "From asking for a merged copy to having it", _LOAD
        )
        self._evictions = self._counter("merged_evictions", "Merged copies that gave way to others")
        self._copies = self._gauge("merged_copies", "Merged copies in memory")
        self._merged_bytes = self._gauge("merged_bytes", "Memory of merged copies")
        self._merged_capacity = self._gauge("merged_capacity_bytes", "Memory that merged copies may take")
        self._decisions = self._counter(
            "auto_decisions", "Changes of the path that AUTO takes, by the new one", ("path",)
        )
        for path in ("MERGED", "UNMERGED"):
            self._decisions.labels(path)

    def _define_combinations(self) -> None:
        self._combinations = self._gauge("combinations", "Linear combinations of adapters in memory")
        self._combined_bytes = self._gauge("combined_bytes", "Memory of linear combinations")
        self._combined_capacity = self._gauge(
            "combined_capacity_bytes", "Memory that linear combinations may take"
        )

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"polygraft_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"polygraft_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()
    ) -> Histogram:
        return Histogram(f"polygraft_{name}", text, labels, buckets=buckets, registry=self.registry)

    def describe_model(self, model: ModelInfo, version: str) -> None:
        """Publish what is being served; `version` is the server's."""
        self._model.clear()
        self._model.labels(
            model.model, model.architecture, model.dtype, model.quantization, model.device, version
        ).set(1)

    def request_submitted(self, adapter: str, kind: str) -> None:
        """Count a request that entered the queue."""
        self._submitted.labels(self._labels.label(adapter), kind or BASE_KIND).inc()

    def tokens_generated(
        self, adapter: str, kind: str, path: str, count: int, interval: float | None
    ) -> None:
        """Count `count` tokens that came `interval` seconds after the request's previous ones."""
        kind = kind or BASE_KIND
        self._generated.labels(self._labels.label(adapter), kind).inc(count)
        if interval is not None:
            latency = self._inter_token.labels(kind, path)
            for _ in range(count):
                latency.observe(interval / count)

    def request_finished(
        self, adapter: str, kind: str, finished: Finished | None, error: Exception | None
    ) -> None:
        """Count a request that ended; one that failed has the finish reason ERROR and no path."""
        own = (self._labels.label(adapter), kind or BASE_KIND)
        if finished is None:
            self._requests.labels(*own, "", "ERROR").inc()
            return
        self._requests.labels(*own, finished.path.value, finished.reason.value).inc()
        self._prompt.labels(*own).inc(finished.usage.prompt_tokens)
        self._cached.labels(*own).inc(finished.usage.cached_tokens)
        self._virtual.labels(*own).inc(finished.usage.virtual_tokens)
        timings, path = finished.timings, finished.path.value
        self._end_to_end.labels(own[1], path).observe(timings.total)
        if timings.queue is not None:
            self._queue.labels(own[1]).observe(timings.queue)
        if timings.time_to_first_token is not None:
            self._first_token.labels(own[1], path).observe(timings.time_to_first_token)

    def occupancy_changed(self, occupancy: Occupancy) -> None:
        """Show what the engine holds now."""
        self._running.set(occupancy.running)
        self._waiting.set(occupancy.waiting)
        self._blocks_used.set(occupancy.kv_blocks_used)
        self._blocks_cached.set(occupancy.kv_blocks_cached)
        self._blocks.set(occupancy.kv_blocks_total)
        self._copies.set(occupancy.merged_copies)
        self._merged_bytes.set(occupancy.merged_bytes)
        self._merged_capacity.set(occupancy.merged_bytes_capacity)
        self._combinations.set(occupancy.combinations)
        self._combined_bytes.set(occupancy.combined_bytes)
        self._combined_capacity.set(occupancy.combined_bytes_capacity)

    def stream_unread(self, limit: str) -> None:
        """Count a stream that was ended because nobody read it, by "bytes" or "time"."""
        self._unread_streams.labels(limit).inc()

    def unread_changed(self, unread: int) -> None:
        """Show how many bytes are unread."""
        self._unread.set(unread)

    def step_finished(self, stats: StepStats) -> None:
        """Record what one step did."""
        self._steps.labels(stats.path).inc()
        self._step_seconds.labels(stats.path).observe(stats.seconds)
        self._path_wait.labels(stats.path).observe(stats.waited)
        self._switches.inc(stats.switched)
        self._prefill_rows.observe(stats.prefill_rows)
        self._decode_rows.observe(stats.decode_rows)
        self._step_adapters.observe(len(stats.adapters))
        self._preemptions.inc(stats.preemptions)
        kinds = Tally(kind for _, kind in stats.adapters)
        if stats.base_rows:
            kinds[BASE_KIND] += 1
        width = (kinds.total(), len(kinds))
        if width > self._widest:
            self._widest = width
            self._widest_step.clear()
            for kind, count in kinds.items():
                self._widest_step.labels(kind).set(count)

    def merge_ended(self, event: MergeEvent) -> None:
        """Count what became of a merged copy."""
        if event.outcome is MergeOutcome.EVICTED:
            self._evictions.inc()
            return
        self._merges.labels(_MERGE_RESULTS[event.outcome]).inc()
        if event.outcome is MergeOutcome.OK:
            self._merge_seconds.observe(event.seconds)

    def path_decided(self, path: LoraPath) -> None:
        """Count a change of what AUTO does."""
        self._decisions.labels(path.value).inc()

    def adapter_changed(self, info: AdapterInfo) -> None:
        """Record where an adapter stands; a generation that is ready for the first time was loaded."""
        before = self._known.get(info.name)
        self._known[info.name] = info
        self._count_adapter(before, info)
        if info.state is AdapterState.READY and (
            before is None
            or before.generation != info.generation
            or before.state in (AdapterState.LOADING, AdapterState.FAILED)
        ):
            self._loads.labels("ok").inc()
            self._load_seconds.observe(info.load_seconds)

    def adapter_load_failed(self, info: AdapterInfo) -> None:
        """Count a load that failed."""
        self._loads.labels("failed").inc()

    def adapter_removed(self, info: AdapterInfo) -> None:
        """Record that an adapter is gone, and drop its series."""
        self._count_adapter(self._known.pop(info.name, None), None)
        self._unloads.inc()
        if self._labels.forget(info.name):
            for metric in self._per_adapter:
                metric.remove_by_labels({"adapter": info.name})

    def _count_adapter(self, before: AdapterInfo | None, now: AdapterInfo | None) -> None:
        """Update the totals by one adapter's change, since a store may hold thousands of adapters."""
        for info, sign in ((before, -1), (now, 1)):
            if info is not None:
                self._adapters.labels(info.state.value).inc(sign)
                self._compiled.inc(sign * info.compiled_bytes)

    def call_finished(self, method: str, code: str) -> None:
        """Count an RPC; `code` is the gRPC status code's name."""
        self._calls.labels(method).inc()
        if code != "OK":
            self._errors.labels(method, code).inc()
