"""A real Prometheus on a port of its own, and what it answers."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

import yaml  # type: ignore[import-untyped]

from tests.deploy.files import ALERTS, CONFIG, read_yaml, tool

INTERVAL = "500ms"
PATIENCE = 20.0
POLL = 0.05

Vector = dict[tuple[str, ...], float]
"""A query's values by the labels that were asked for."""


def settle(what: str, check: Callable[[], bool]) -> None:
    """Wait until `check` holds."""
    deadline = time.monotonic() + PATIENCE
    while not check():
        assert time.monotonic() < deadline, f"{what}: not after {PATIENCE:.0f} s"
        time.sleep(POLL)


class Prometheus:
    """Scrapes a server while the context lasts, with the configuration and the alerts of `deploy/`.

    Only the target and the intervals are others.

    Args:
        target: HOST:PORT of the metrics endpoint.
        folder: an empty one, for its data.
    """

    def __init__(self, target: str, folder: Path) -> None:
        self._program = tool("prometheus")
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._address = f"127.0.0.1:{probe.getsockname()[1]}"
        config = read_yaml(CONFIG)
        config["global"] = {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL}
        config["rule_files"] = [str(ALERTS)]
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))

    def __enter__(self) -> Self:
        self._log = (self._folder / "log").open("wb")
        self._process = subprocess.Popen(
            [
                self._program,
                f"--config.file={self._folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={self._folder / 'data'}",
                f"--web.listen-address={self._address}",
                "--log.level=warn",
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            settle("Prometheus is ready", self._ready)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _ready(self) -> bool:
        assert self._process.poll() is None, (self._folder / "log").read_text()
        try:
            return self._get("/-/ready")[0] == 200
        except OSError:
            return False

    def _get(self, path: str, **parameters: str) -> tuple[int, bytes]:
        # http.client and not urllib: a proxy of the environment can't lead to this machine itself
        connection = http.client.HTTPConnection(self._address, timeout=PATIENCE)
        try:
            connection.request("GET", f"{path}?{urlencode(parameters)}")
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def api(self, path: str, **parameters: str) -> Any:
        """`data` of an answer that must be a success."""
        answer = json.loads(self._get(f"/api/v1/{path}", **parameters)[1])
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def query(self, expression: str, *labels: str, at: float | None = None) -> Vector:
        """An instant query, now or at a moment; the values by `labels`, which must tell them apart."""
        when = {} if at is None else {"time": repr(at)}
        data = self.api("query", query=expression, **when)
        assert data["resultType"] == "vector", expression
        found: Vector = {}
        for sample in data["result"]:
            key = tuple(sample["metric"].get(label, "") for label in labels)
            assert not labels or key not in found, (expression, key)
            # Without labels any order of the samples does.
            found[key if labels else (str(len(found)),)] = float(sample["value"][1])
        return found

    def value(self, expression: str, *, at: float | None = None) -> float:
        """The one value of an expression."""
        (value,) = self.query(expression, at=at).values()
        return value

    def wait_scraped(self) -> float:
        """Wait for a scrape that began after this call; returns when it began."""
        called = time.time()
        seen = 0.0

        def scraped() -> bool:
            nonlocal seen
            # A gauge that is always there: its sample has the time of its scrape.
            seen = max(self.query("timestamp(polygraft_running_requests)").values(), default=0.0)
            return seen > called

        settle("a scrape", scraped)
        return seen

    def rules(self) -> list[dict[str, Any]]:
        """All rules, once each has been evaluated."""
        found: list[dict[str, Any]] = []

        def evaluated() -> bool:
            found[:] = [rule for group in self.api("rules")["groups"] for rule in group["rules"]]
            return bool(found) and all(rule["health"] != "unknown" for rule in found)

        settle("every rule is evaluated", evaluated)
        return found
