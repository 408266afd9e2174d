from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from polygraft.core.names import STACK
from polygraft.engine.client import ModelInfo, Occupancy, StepStats
from polygraft.telemetry.labels import OTHER, AdapterLabels
from polygraft.telemetry.metrics import Metrics
from polygraft_types.adapters import AdapterInfo, AdapterState
from polygraft_types.answers import Finished, FinishReason, Timings, Usage
from polygraft_types.requests import LoraPath, SamplingParams

DOCS = Path(__file__).parents[2] / "docs" / "guides" / "metrics.md"

FINISHED = Finished(
    reason=FinishReason.LENGTH,
    usage=Usage(prompt_tokens=10, completion_tokens=4, cached_tokens=3, virtual_tokens=8),
    timings=Timings(total=2.0, queue=0.2, prefill=0.3, time_to_first_token=0.5),
    seed=0,
    path=LoraPath.UNMERGED,
    adapter_generations=(1,),
)
STEP = StepStats(
    seconds=0.05,
    path="UNMERGED",
    prefill_rows=30,
    decode_rows=2,
    adapters=(("json", "lora"), ("shout", "lora"), ("poet", "prefix_tuning")),
    base_rows=True,
    preemptions=1,
)
HELD = Occupancy(
    running=4,
    waiting=2,
    kv_blocks_used=7,
    kv_blocks_cached=5,
    kv_blocks_total=100,
    combinations=3,
    combined_bytes=300,
    combined_bytes_capacity=400,
)
READY = AdapterInfo(
    "json", AdapterState.READY, "json", generation=1, kind="lora", compiled_bytes=1000, load_seconds=0.3
)
MODEL = ModelInfo(
    model="m",
    architecture="llama",
    dtype="float32",
    quantization="none",
    device="cpu",
    context_length=1,
    vocabulary_size=1,
    parameters=1,
    weight_bytes=1,
    kv_cache_bytes=1,
    max_num_seqs=1,
    max_num_batched_tokens=1,
    eos_token_ids=(),
    default_sampling=SamplingParams(),
    has_chat_template=False,
)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(max_adapter_labels=2)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"polygraft_{name}", labels)


def busy(metrics: Metrics) -> Metrics:
    """Everything that there is to report, once."""
    metrics.describe_model(MODEL, "1.0")
    metrics.adapter_changed(READY)
    metrics.adapter_load_failed(AdapterInfo("broken", AdapterState.FAILED, "broken", problems=("x",)))
    metrics.adapter_changed(AdapterInfo("broken", AdapterState.FAILED, "broken", problems=("x",)))
    for adapter, kind in (("json", "lora"), ("", "")):
        metrics.request_submitted(adapter, kind)
        metrics.tokens_generated(adapter, kind, "UNMERGED", 1, None)
        metrics.tokens_generated(adapter, kind, "UNMERGED", 1, 0.04)
        metrics.request_finished(adapter, kind, FINISHED, None)
    metrics.step_finished(STEP)
    metrics.call_finished("/polygraft.v1.InferenceService/Generate", "OK")
    metrics.call_finished("/polygraft.v1.InferenceService/Generate", "INTERNAL")
    metrics.adapter_removed(AdapterInfo("broken", AdapterState.FAILED, "broken"))
    return metrics


def test_a_request_is_counted(metrics: Metrics) -> None:
    busy(metrics)
    own = {"adapter": "json", "kind": "lora"}
    assert value(metrics, "submitted_requests_total", **own) == 1
    assert value(metrics, "requests_total", **own, path="UNMERGED", finish_reason="LENGTH") == 1
    assert value(metrics, "prompt_tokens_total", **own) == 10
    assert value(metrics, "cached_tokens_total", **own) == 3
    assert value(metrics, "virtual_tokens_total", **own) == 8
    assert value(metrics, "generated_tokens_total", **own) == 2
    for name, seconds in (
        ("time_to_first_token", 0.5),
        ("inter_token_latency", 0.04),
        ("end_to_end", 2.0),
        ("queue", 0.2),
    ):
        path = {} if name == "queue" else {"path": "UNMERGED"}
        assert value(metrics, f"{name}_seconds_sum", kind="lora", **path) == pytest.approx(seconds)
        assert value(metrics, f"{name}_seconds_count", kind="lora", **path) == 1
        assert value(metrics, f"{name}_seconds_count", kind="base", **path) == 1


def test_the_base_model_has_an_empty_name_that_no_adapter_can_have(metrics: Metrics) -> None:
    metrics.request_submitted("", "")
    metrics.request_submitted("base", "lora")
    assert value(metrics, "submitted_requests_total", adapter="", kind="base") == 1
    assert value(metrics, "submitted_requests_total", adapter="base", kind="lora") == 1


def test_a_failed_request_is_counted_apart(metrics: Metrics) -> None:
    metrics.request_submitted("json", "lora")
    metrics.request_finished("json", "lora", None, RuntimeError("x"))
    labels = {"adapter": "json", "kind": "lora", "path": "", "finish_reason": "ERROR"}
    assert value(metrics, "requests_total", **labels) == 1
    assert value(metrics, "end_to_end_seconds_count", kind="lora") is None


def test_a_request_that_ends_before_its_first_token(metrics: Metrics) -> None:
    metrics.request_submitted("", "")
    metrics.request_finished("", "", replace(FINISHED, timings=Timings(total=0.1)), None)
    assert value(metrics, "end_to_end_seconds_count", kind="base", path="UNMERGED") == 1
    assert value(metrics, "time_to_first_token_seconds_count", kind="base", path="UNMERGED") is None


def test_several_tokens_of_one_step_share_its_interval(metrics: Metrics) -> None:
    metrics.tokens_generated("", "", "MERGED", 4, 0.2)
    assert value(metrics, "inter_token_latency_seconds_count", kind="base", path="MERGED") == 4
    assert value(metrics, "inter_token_latency_seconds_sum", kind="base", path="MERGED") == pytest.approx(0.2)


def test_a_step_is_recorded(metrics: Metrics) -> None:
    metrics.step_finished(STEP)
    assert value(metrics, "steps_total", path="UNMERGED") == 1
    assert value(metrics, "step_seconds_sum", path="UNMERGED") == pytest.approx(0.05)
    assert value(metrics, "step_rows_sum", phase="prefill") == 30
    assert value(metrics, "step_rows_sum", phase="decode") == 2
    assert value(metrics, "step_adapters_sum") == 3
    assert value(metrics, "preemptions_total") == 1


def test_what_the_engine_holds_is_shown(metrics: Metrics) -> None:
    metrics.occupancy_changed(HELD)
    assert value(metrics, "running_requests") == 4
    assert value(metrics, "waiting_requests") == 2
    assert value(metrics, "kv_blocks_used") == 7
    assert value(metrics, "kv_blocks_cached") == 5
    assert value(metrics, "kv_blocks_capacity") == 100
    assert value(metrics, "combinations") == 3
    assert value(metrics, "combined_bytes") == 300
    assert value(metrics, "combined_capacity_bytes") == 400


def test_the_widest_step_is_remembered_by_kind(metrics: Metrics) -> None:
    def widest() -> dict[str, float]:
        name = "polygraft_widest_step_adapters"
        family = next(family for family in metrics.registry.collect() if family.name == name)
        return {sample.labels["kind"]: sample.value for sample in family.samples}

    assert widest() == {}
    metrics.step_finished(replace(STEP, adapters=(("json", "lora"),), base_rows=False))
    assert widest() == {"lora": 1}
    metrics.step_finished(STEP)
    assert widest() == {"lora": 2, "prefix_tuning": 1, "base": 1}
    metrics.step_finished(replace(STEP, base_rows=False))
    assert widest() == {"lora": 2, "prefix_tuning": 1, "base": 1}
    wide = tuple((f"a{number}", "lora") for number in range(9))
    metrics.step_finished(replace(STEP, adapters=wide, base_rows=False))
    assert widest() == {"lora": 9}


def test_adapters_by_state(metrics: Metrics) -> None:
    assert value(metrics, "adapters", state="READY") == 0
    metrics.adapter_changed(replace(READY, state=AdapterState.LOADING, compiled_bytes=0))
    assert value(metrics, "adapters", state="LOADING") == 1
    metrics.adapter_changed(READY)
    assert value(metrics, "adapters", state="LOADING") == 0
    assert value(metrics, "adapters", state="READY") == 1
    assert value(metrics, "adapter_compiled_bytes") == 1000
    metrics.adapter_changed(replace(READY, state=AdapterState.UNLOADING))
    assert value(metrics, "adapters", state="UNLOADING") == 1
    metrics.adapter_removed(READY)
    assert value(metrics, "adapters", state="UNLOADING") == 0
    assert value(metrics, "adapter_compiled_bytes") == 0
    assert value(metrics, "adapter_unloads_total") == 1


def test_loads_are_counted_once_a_generation(metrics: Metrics) -> None:
    metrics.adapter_changed(READY)
    metrics.adapter_changed(READY)
    assert value(metrics, "adapter_loads_total", result="ok") == 1
    metrics.adapter_changed(replace(READY, generation=2))
    assert value(metrics, "adapter_loads_total", result="ok") == 2
    assert value(metrics, "adapter_load_seconds_count") == 2
    failed = AdapterInfo("b", AdapterState.FAILED, "b", problems=("x",))
    metrics.adapter_load_failed(failed)
    metrics.adapter_changed(failed)
    assert value(metrics, "adapter_loads_total", result="failed") == 1


def adapter_labels(metrics: Metrics) -> set[str]:
    found = set()
    for family in metrics.registry.collect():
        found |= {sample.labels["adapter"] for sample in family.samples if "adapter" in sample.labels}
    return found


def use(metrics: Metrics, name: str) -> None:
    metrics.request_submitted(name, "lora")
    metrics.tokens_generated(name, "lora", "MERGED", 1, None)
    metrics.request_finished(name, "lora", FINISHED, None)


def test_adapter_labels_are_bounded(metrics: Metrics) -> None:
    for number in range(50):
        use(metrics, f"a{number}")
    use(metrics, "")
    use(metrics, STACK)
    assert adapter_labels(metrics) == {"a0", "a1", OTHER, "", STACK}
    assert value(metrics, "prompt_tokens_total", adapter=OTHER, kind="lora") == 480


def test_series_vanish_with_the_adapter_and_its_place_is_free(metrics: Metrics) -> None:
    for name in ("json", "shout"):
        use(metrics, name)
        metrics.adapter_changed(replace(READY, name=name))
    metrics.adapter_removed(READY)
    assert adapter_labels(metrics) == {"shout"}
    use(metrics, "poet")
    assert adapter_labels(metrics) == {"shout", "poet"}
    metrics.adapter_removed(replace(READY, name="never used"))
    assert adapter_labels(metrics) == {"shout", "poet"}


def test_labels_that_stand_for_several_are_no_adapters_name() -> None:
    labels = AdapterLabels(limit=0)
    assert labels.label("json") == OTHER
    assert labels.label("") == ""
    assert not re.match(r"[A-Za-z0-9]", OTHER)
    assert not labels.forget("json")


def test_every_metric_is_documented_and_every_documented_one_exists(metrics: Metrics) -> None:
    exposed = set(
        re.findall(r"^# TYPE (\S+)", generate_latest(busy(metrics).registry).decode(), re.MULTILINE)
    )
    documented = set(re.findall(r"^\| `(\w+)`", DOCS.read_text(), re.MULTILINE))
    assert exposed == documented


def test_documented_types_and_labels_are_right(metrics: Metrics) -> None:
    rows = re.findall(r"^\| `(polygraft_\w+)` \| (\w+) \| (.*?) \|", DOCS.read_text(), re.MULTILINE)
    documented = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    for family in busy(metrics).registry.collect():
        if family.name.startswith("polygraft_"):
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = set().union(*(sample.labels for sample in family.samples)) - {"le"}
            assert documented[name] == (family.type, labels)


def test_promtool_accepts_the_output(metrics: Metrics) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    page = generate_latest(busy(metrics).registry)
    checked = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert not checked.stderr


def test_no_creation_times(metrics: Metrics) -> None:
    assert b"_created" not in generate_latest(busy(metrics).registry)


def test_two_sets_of_metrics_are_independent() -> None:
    first, second = Metrics(), Metrics()
    use(first, "json")
    assert adapter_labels(second) == set()
