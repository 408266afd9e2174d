"""The files that can't be run here name only what exists."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from polygraft.config import ServerConfig
from tests.deploy.files import (
    COMPOSE,
    CONFIG,
    DEPLOY,
    alerts,
    dashboard,
    metrics_in,
    queries,
    read_yaml,
)

DOCS = DEPLOY.parent / "docs" / "guides" / "metrics.md"
GRAFANA = DEPLOY / "grafana"
SERVICES: dict[str, dict[str, Any]] = read_yaml(COMPOSE)["services"]
VOLUMES: dict[str, Any] = read_yaml(COMPOSE)["volumes"]


def mounts(service: str) -> dict[str, tuple[str, bool]]:
    """Source and whether it is read-only, by the path inside."""
    found = {}
    for mount in SERVICES[service].get("volumes", ()):
        # What stands in braces may hold colons of its own.
        source, inside, *options = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", mount).split(":")
        found[inside] = (source, options == ["ro"])
    return found


def test_nothing_is_published_beyond_loopback() -> None:
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_secrets_come_from_the_environment_and_are_asked_for() -> None:
    assert SERVICES["server"]["environment"]["POLYGRAFT_ADMIN_TOKEN"].startswith("${POLYGRAFT_ADMIN_TOKEN:?")
    assert SERVICES["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"].startswith(
        "${GRAFANA_ADMIN_PASSWORD:?"
    )


def test_the_servers_variables_are_settings() -> None:
    names = {name.removeprefix("POLYGRAFT_").lower() for name in SERVICES["server"]["environment"]}
    assert names <= set(ServerConfig.model_fields)


def test_the_store_is_mounted_where_the_image_looks_and_only_to_be_read() -> None:
    image = (DEPLOY.parent / "Dockerfile").read_text()
    assert "POLYGRAFT_ADAPTERS=/adapters" in image
    assert mounts("server")["/adapters"] == ("../adapters", True)
    assert f'"{next(path for path in mounts("server") if path.endswith("polygraft"))}"' in image


def test_the_images_base_is_pinned_by_digest() -> None:
    image = (DEPLOY.parent / "Dockerfile").read_text()
    (base,) = re.findall(r"^ARG PYTHON=(.*)$", image, re.MULTILINE)
    assert re.fullmatch(r"python:[\w.-]+@sha256:[0-9a-f]{64}", base)
    stages = re.findall(r"^FROM (\S+)", image, re.MULTILINE)
    assert stages == ["${PYTHON}"] * 2


@pytest.mark.parametrize("service", SERVICES)
def test_what_is_mounted_exists(service: str) -> None:
    for source, read_only in mounts(service).values():
        if source.startswith("."):
            assert (DEPLOY / source).is_dir()
            assert read_only
        else:
            assert source in VOLUMES


def test_they_find_each_other() -> None:
    scrape = read_yaml(CONFIG)["scrape_configs"][0]
    assert scrape["job_name"] == "polygraft"
    assert scrape["static_configs"] == [{"targets": ["server:9464"]}]
    assert "POLYGRAFT_METRICS=0.0.0.0:9464" in (DEPLOY.parent / "Dockerfile").read_text()
    (source,) = read_yaml(GRAFANA / "provisioning/datasources/prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert SERVICES["prometheus"]["ports"][0].endswith(":9090")
    assert source["jsonData"]["timeInterval"] == read_yaml(CONFIG)["global"]["scrape_interval"]
    (provider,) = read_yaml(GRAFANA / "provisioning/dashboards/polygraft.yml")["providers"]
    assert mounts("grafana")[provider["options"]["path"]] == ("./grafana/dashboards", True)


def test_the_dashboard_is_whole() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == [
        "Traffic",
        "Latency",
        "Batching",
        "Memory and KV cache",
        "Adapters",
        "Merged path",
        "Errors",
    ]
    titles = [panel["title"] for panel in panels]
    assert len(set(titles)) == len(titles)
    for panel in panels:
        if panel["type"] != "row":
            assert panel["description"], panel["title"]
            assert panel["targets"], panel["title"]
            assert panel["datasource"]["uid"] == "${datasource}"
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_every_metric_that_is_asked_for_is_documented() -> None:
    documented = set(re.findall(r"^\| `(\w+)`", DOCS.read_text(encoding="utf-8"), re.MULTILINE))
    asked = {name for query in queries() for name in query.metrics}
    asked |= {name for rule in alerts() for name in metrics_in(rule["expr"])}
    assert asked <= documented


def test_every_alert_is_documented() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert set(re.findall(r"\bPolygraft[A-Z]\w+", text)) == {rule["alert"] for rule in alerts()}


def test_the_readme_names_every_file() -> None:
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    for path in sorted(DEPLOY.rglob("*")):
        name = path.relative_to(DEPLOY)
        if path.is_file() and name != Path("README.md"):
            assert f"`{name}`" in text or f"`{'/'.join(name.parts[:2])}/`" in text, name


def install_step(**arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the image's step that installs with sh, which prints pip's arguments instead of calling it."""
    image = re.sub(r"^\s*#.*\n", "", (DEPLOY.parent / "Dockerfile").read_text(), flags=re.MULTILINE)
    (step,) = [
        step for step in re.findall(r"^RUN ((?:.*\\\n)*.*)", image, re.MULTILINE) if "constraints.txt" in step
    ]
    script = step.partition("&& /opt/polygraft/bin/python")[0].rstrip(" \\\n")
    script = script.replace("python -m venv /opt/polygraft", "true").replace(
        "/opt/polygraft/bin/pip", "printf '%s\\n'"
    )
    defaults = dict(re.findall(r"^ARG (\w+)=(.*)$", image, re.MULTILINE))
    return subprocess.run(
        ["sh", "-eu", "-c", script], cwd=DEPLOY.parent, env={**os.environ, **defaults, **arguments},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_image_takes_the_cpu_build_unless_asked() -> None:
    version = re.search(r"^torch==(.*)$", (DEPLOY.parent / "constraints.txt").read_text(), re.MULTILINE)[1]  # type: ignore[index]
    refused = install_step()
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "TORCH_INDEX is empty" in refused.stderr
    small = install_step(TORCH_INDEX="file:///wheels").stdout.split()
    assert small[-4:] == ["--extra-index-url", "file:///wheels", f"torch=={version}+cpu", ".[server]"]
    assert install_step(TORCH="cuda").stdout.split()[-2:] == [f"torch=={version}", ".[server]"]
    assert "not gpu" in install_step(TORCH="gpu").stderr
    arguments = SERVICES["server"]["build"]["args"]
    assert arguments == {"TORCH": "${POLYGRAFT_TORCH:-cpu}", "TORCH_INDEX": "${POLYGRAFT_TORCH_INDEX:-}"}


def test_the_image_is_given_every_file_that_the_build_reads() -> None:
    copied = re.findall(r"^COPY (?!--)(.*) \S+$", (DEPLOY.parent / "Dockerfile").read_text(), re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    assert {"pyproject.toml", "setup.py", "adapters", project["readme"], *project["license-files"]} <= names
    assert all((DEPLOY.parent / name).exists() for name in names)
