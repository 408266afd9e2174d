"""What `deploy/` holds, as the tests read it."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CONFIG = DEPLOY / "prometheus" / "prometheus.yml"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
ALERTS_TEST = DEPLOY / "prometheus" / "alerts_test.yml"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "polygraft.json"
COMPOSE = DEPLOY / "compose.yaml"


@dataclass(frozen=True, slots=True)
class Query:
    """One expression of the dashboard; `panel` is the title of its panel."""

    panel: str
    expression: str

    @property
    def metrics(self) -> set[str]:
        """Names of our metrics in it, as `docs/guides/metrics.md` has them."""
        return metrics_in(self.expression)

    def at(self, window: str) -> str:
        """The expression as Grafana sends it for all servers, with `window` for its ranges."""
        filled = self.expression.replace("$instance", ".*")
        for name in ("$__rate_interval", "$__range"):
            filled = filled.replace(name, window)
        assert "$" not in filled, self
        return filled


def metrics_in(expression: str) -> set[str]:
    """Names of our metrics in an expression, as `docs/guides/metrics.md` has them."""
    names = re.findall(r"\bpolygraft_[a-z_]+", expression)
    return {re.sub(r"(_seconds|_rows|_adapters|_steps)_(bucket|sum|count)$", r"\1", name) for name in names}


def tool(name: str) -> str:
    """Path of a program of Debian's package prometheus; without it the test is skipped, or fails if it may not be."""
    found = shutil.which(name)
    if found is None and os.environ.get("POLYGRAFT_REQUIRE_PROMETHEUS") == "1":
        pytest.fail(f"{name} is not installed, and POLYGRAFT_REQUIRE_PROMETHEUS=1")
    if found is None:
        pytest.skip(f"{name} is not installed (Debian's package prometheus has it)")
    return found


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def alerts() -> list[dict[str, Any]]:
    return [rule for group in read_yaml(ALERTS)["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    board: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return board


def queries() -> list[Query]:
    """Every expression of every panel, and those that fill the dashboard's variables."""
    board = dashboard()
    found = [
        Query(panel["title"], target["expr"])
        for panel in board["panels"]
        for target in panel.get("targets", ())
    ]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
            found.append(Query(f"${variable['name']}", f"group by ({label}) ({metric})"))
    return found
