"""`polygraft bench`: what is planned, what is sent, and what is made of it."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import grpc
import pytest

from polygraft.cli.bench.plan import Choice, Load, plan
from polygraft.cli.bench.report import summarise, summary
from polygraft.cli.bench.run import Measured
from polygraft_api.v1 import adapters_pb2, inference_pb2
from tests.client.scripted import Script, adapter, status

from .conftest import Invoke


def load(**changes: object) -> Load:
    settings: dict[str, object] = {
        "adapters": ["a", "b", "c", ""], "choice": Choice.UNIFORM, "exponent": 1.0, "prompt_tokens": 8,
        "new_tokens": 4, "shared_tokens": 0, "rate": None, "vocabulary_size": 50, "seed": 0,
    }  # fmt: skip
    return Load(**{**settings, **changes})


def first(count: int, **changes: object) -> list:
    return list(itertools.islice(plan(load(**changes)), count))


def generations(script: Script) -> list[inference_pb2.GenerateRequest]:
    return [r for r in script.requests if isinstance(r, inference_pb2.GenerateRequest)]


def test_a_seed_settles_everything() -> None:
    assert first(20, rate=3.0) == first(20, rate=3.0)
    assert first(20, rate=3.0) != first(20, rate=3.0, seed=1)


def test_prompts_have_their_length_their_shared_part_and_ids_of_the_vocabulary() -> None:
    planned = first(10, prompt_tokens=9, shared_tokens=5)
    assert {len(p.token_ids) for p in planned} == {9}
    assert len({p.token_ids[:5] for p in planned}) == 1
    assert len({p.token_ids for p in planned}) == 10
    assert all(0 <= token < 50 for p in planned for token in p.token_ids)


def test_uniform_and_zipf() -> None:
    uniform = Counter(p.adapter for p in first(4000))
    assert all(900 < uniform[name] < 1100 for name in ("a", "b", "c", ""))
    zipf = Counter(p.adapter for p in first(4000, choice=Choice.ZIPF))
    harmonic = sum(1 / n for n in range(1, 5))
    for n, name in enumerate(("a", "b", "c", ""), start=1):
        assert zipf[name] == pytest.approx(4000 / n / harmonic, rel=0.15)


def test_an_open_loop_has_its_rate_and_a_closed_one_no_times() -> None:
    assert {p.at for p in first(10)} == {0.0}
    times = [p.at for p in first(2000, rate=20.0)]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(100, rel=0.1)


def test_percentiles_leave_out_what_failed() -> None:
    good = [
        Measured("a", first_token=n / 1000, total=1.0, tokens=3, intervals=[0.01, 0.03])
        for n in range(1, 102)
    ]
    report = summarise([*good, Measured("b", error="DeadlineExceeded")], 2.0)
    assert (report.requests, report.errors, report.distinct_adapters) == (102, {"DeadlineExceeded": 1}, 2)
    assert report.time_to_first_token_ms == {"p50": 51.0, "p90": 91.0, "p95": 96.0, "p99": 100.0}
    assert report.inter_token_latency_ms["p50"] == pytest.approx(20.0)
    assert (report.output_tokens_per_s, report.requests_per_s) == (303 / 2, 101 / 2)
    assert "1 failed (1 DeadlineExceeded)" in summary(report)


def test_asks_every_ready_adapter_and_prints_a_table(call: Invoke, script: Script) -> None:
    failed = adapter("broken", state=adapters_pb2.ADAPTER_STATE_FAILED, problems=["cut"])
    script.adapters = [adapter("headline"), adapter("mood"), failed]
    result = call("bench", "--requests", 12, "--concurrency", 3, "--warmup", 2, "--new-tokens", 3)
    assert result.exit_code == 0, result.output
    sent = generations(script)
    assert len(sent) == 14
    assert {request.adapter for request in sent} == {"headline", "mood"}
    assert {request.stopping.max_new_tokens for request in sent} == {3}
    assert "12 requests over 2 adapters" in result.stdout
    assert "time to first token" in result.stdout


@pytest.mark.parametrize("loop", [[], ["--rate", 200]])
def test_json_for_programs(call: Invoke, script: Script, loop: list[object]) -> None:
    script.adapters = []
    result = call("bench", "--requests", 5, "--warmup", 0, "--json", *loop)
    report = json.loads(result.stdout)
    assert (report["requests"], report["errors"]) == (5, {})
    assert report["output_tokens"] > 0
    assert set(report["total_ms"]) == {"p50", "p90", "p95", "p99"}
    assert {request.adapter for request in generations(script)} == {""}


def test_failures_are_counted_and_make_it_fail(call: Invoke, script: Script) -> None:
    receive = script.receive

    def full_once(request: Any, context: grpc.ServicerContext) -> None:
        if isinstance(request, inference_pb2.GenerateRequest) and not generations(script):
            script.failures = [status(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", reason="R")]
        receive(request, context)

    script.receive = full_once
    result = call("bench", "--adapter", "mood", "--requests", 4, "--concurrency", 1, "--warmup", 0, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["errors"] == {"ResourceExhausted": 1}


def test_a_shared_part_longer_than_the_prompt(call: Invoke) -> None:
    result = call("bench", "--prompt-tokens", 8, "--shared-tokens", 9)
    assert result.exit_code == 2
    assert "--shared-tokens" in result.stderr


def test_an_adapter_that_cant_be_used_is_an_error_before_any_load(call: Invoke, script: Script) -> None:
    text = "adapter 'json': not registered; did you mean 'json-contact'?"
    script.failures = [status(grpc.StatusCode.NOT_FOUND, text, reason="ADAPTER_NOT_FOUND")]
    result = call("bench", "--adapter", "json")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"error: {text}\n")
    assert [request.adapter for request in script.requests] == ["json"]
