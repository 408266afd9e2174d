"""Stands in for `polygraft serve` in a process of its own: the scripted servicer and some metrics.

Usage: fake_server.py [crash|stubborn|fails-to-stop|failed-adapter|held]

Writes its process id to the file that FAKE_SERVER_PID names, if any.
"""

import os
import signal
import sys
import threading
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, start_http_server

from polygraft_api.v1 import adapters_pb2
from tests.client.scripted import ScriptedServer, adapter


def main(manner: str = "") -> int:
    if path := os.environ.get("FAKE_SERVER_PID"):
        Path(path).write_text(str(os.getpid()))
    print("loading the base model", file=sys.stderr, flush=True)
    if manner == "crash":
        print("error: --model: no such folder", file=sys.stderr)
        return 2
    stop = threading.Event()
    if manner == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
    registry = CollectorRegistry()
    widest = Gauge("polygraft_widest_step_adapters", "Widest step", ["kind"], registry=registry)
    for kind, count in {"lora": 1, "p_tuning": 1, "base": 1}.items():
        widest.labels(kind).set(count)
    Gauge("process_resident_memory_bytes", "Memory", registry=registry).set(700e6)
    http, _ = start_http_server(0, "127.0.0.1", registry)
    with ScriptedServer() as server:
        server.script.adapters = [adapter("headline"), adapter("mood", kind="p_tuning", virtual_tokens=16)]
        if manner == "held":
            server.script.hold = threading.Event()
        if manner == "failed-adapter":
            failed = adapter("bad", state=adapters_pb2.ADAPTER_STATE_FAILED, problems=["it is cut short"])
            server.script.adapters.append(failed)
        print(f"polygraft ready: grpc={server.address} metrics=127.0.0.1:{http.server_port}", flush=True)
        stop.wait()
    print("drained", file=sys.stderr, flush=True)
    return 4 if manner == "fails-to-stop" else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
