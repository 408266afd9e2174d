"""A server whose engine ends tells everybody, through real channels, and its process ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from polygraft.cli.demo.launcher import parse_ready
from polygraft_api.v1 import inference_pb2 as pb
from polygraft_api.v1 import inference_pb2_grpc

SERVER = """
import sys, threading
from polygraft.config import ServerConfig
from polygraft.engine.model_runner import ModelRunner
from polygraft.server import run as serve

real = ModelRunner.run

def run(self, batch):
    longest = max(item.sequence.num_tokens for item in batch.items)
    if longest > 100:
        raise SystemExit(0)
    if longest > 60:
        threading.Event().wait()
    return real(self, batch)

ModelRunner.run = run
sys.exit(serve(ServerConfig(
    model=sys.argv[1], listen="127.0.0.1:0", metrics="", threads=1, kv_cache_bytes=2**22, step_timeout=1.0,
)))
"""


def generate(stub: inference_pb2_grpc.InferenceServiceStub, characters: int) -> None:
    request = pb.GenerateRequest(prompt="x" * characters, stopping={"max_new_tokens": 20, "ignore_eos": True})
    for _ in stub.GenerateStream(request, timeout=60):
        pass


@pytest.mark.parametrize(("how", "characters"), [("a hang", 70), ("an exit", 110)])
def test_the_end_of_the_engine(llama: Path, how: str, characters: int) -> None:
    command = [sys.executable, "-c", SERVER, str(llama)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        ready = parse_ready(server.stdout.readline())
        assert ready is not None
        with grpc.insecure_channel(ready.grpc) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            generate(stub, 5)
            with pytest.raises(grpc.RpcError) as caught:
                generate(stub, characters)
            assert caught.value.code() is grpc.StatusCode.INTERNAL
            info = error_details_pb2.ErrorInfo()
            status = rpc_status.from_call(caught.value)
            assert status is not None
            assert status.details[0].Unpack(info)
            assert info.reason == "ENGINE_DEAD"
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        _, log = server.communicate(timeout=30)
        assert server.returncode == 1
        assert "the engine has failed" in log
        assert ("one step for 1 s (--step-timeout)" in log and 'File "<string>"' in log) == (how == "a hang")
