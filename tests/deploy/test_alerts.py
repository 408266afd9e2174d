"""The alerts, judged by Prometheus' own tool."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.deploy.files import ALERTS, ALERTS_TEST, CONFIG, alerts, read_yaml, tool

NAMES = [rule["alert"] for rule in alerts()]


@pytest.mark.parametrize(
    "command",
    [("check", "config", str(CONFIG)), ("check", "rules", str(ALERTS)), ("test", "rules", str(ALERTS_TEST))],
    ids=lambda command: " ".join(command[:2]),
)
def test_promtool_is_content(command: tuple[str, ...]) -> None:
    done = subprocess.run([tool("promtool"), *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_one_is_woken_for() -> None:
    assert len(NAMES) == len(set(NAMES))
    assert {
        "PolygraftDown",
        "PolygraftEngineStalled",
        "PolygraftQueueGrowing",
        "PolygraftKvCacheFull",
        "PolygraftAdaptersFailed",
        "PolygraftAdapterLoadsFailing",
    } <= set(NAMES)


@pytest.mark.parametrize("rule", alerts(), ids=NAMES)
def test_an_alert_says_how_bad_it_is_and_what_to_do(rule: dict[str, dict[str, str]]) -> None:
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert set(rule["annotations"]) == {"summary", "description"}
    assert len(rule["annotations"]["summary"]) < 80
    assert rule["annotations"]["description"].endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_an_alert_is_shown_firing_and_silent(name: str) -> None:
    shown = {
        bool(case["exp_samples"])
        for test in read_yaml(ALERTS_TEST)["tests"]
        for case in test["promql_expr_test"]
        if re.search(rf'alertname="{name}"', case["expr"])
    }
    assert shown == {True, False}
