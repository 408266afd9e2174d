"""Clients that have no stubs: reflection, and grpcurl on top of it."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from polygraft.rpc.grpc_server import ADAPTERS, HEALTH, INFERENCE
from tests.rpc.conftest import Serve, Served

GRPCURL = Path(sys.executable).with_name("grpcurl")
needs_grpcurl = pytest.mark.skipif(not GRPCURL.exists(), reason="grpcurl is not installed")


async def grpcurl(served: Served, *arguments: str, data: object = None) -> tuple[int, str, str]:
    body = [] if data is None else ["-d", json.dumps(data)]
    target, *rest = arguments
    process = await asyncio.create_subprocess_exec(
        GRPCURL,
        "-plaintext",
        *rest,
        *body,
        f"127.0.0.1:{served.port}",
        *target.split(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_reflection_lists_every_service(served: Served) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = [answer async for answer in stub.ServerReflectionInfo(iter([request]))]
    names = {service.name for service in answers[0].list_services_response.service}
    assert names == {INFERENCE, ADAPTERS, HEALTH, "grpc.reflection.v1alpha.ServerReflection"}


@needs_grpcurl
async def test_a_strangers_calls(served: Served) -> None:
    code, out, err = await grpcurl(served, "list")
    assert (code, err) == (0, "")
    assert INFERENCE in out.split()
    ask = {"prompt": "hi", "adapter": "json", "stopping": {"maxNewTokens": 8}}
    code, out, err = await grpcurl(served, f"{INFERENCE}/Generate", data=ask)
    assert (code, err) == (0, "")
    assert json.loads(out)["text"] == "Hello world"
    code, out, err = await grpcurl(served, f"{INFERENCE}/GenerateStream", data=ask)
    assert (code, err) == (0, "")
    assert '"finish_reason": "FINISH_REASON_STOP_SEQUENCE"' in out
    code, out, _ = await grpcurl(served, f"{HEALTH}/Check", data={"service": INFERENCE})
    assert (code, json.loads(out)) == (0, {"status": "SERVING"})


@needs_grpcurl
async def test_a_strangers_mistake_comes_back_with_its_field(served: Served) -> None:
    code, _, err = await grpcurl(
        served, f"{INFERENCE}/Generate", data={"prompt": "hi", "sampling": {"topP": 2}}
    )
    assert code != 0
    assert "InvalidArgument" in err
    assert "sampling.top_p: must be in (0, 1], got 2.0" in err


@needs_grpcurl
async def test_a_stranger_with_the_token(serve_with: Serve) -> None:
    async with serve_with(admin_token="correct-horse-battery") as served:
        code, _, err = await grpcurl(served, f"{ADAPTERS}/ListAdapters")
        assert code != 0
        assert "Unauthenticated" in err
        header = "authorization: Bearer correct-horse-battery"
        code, out, _ = await grpcurl(served, f"{ADAPTERS}/ListAdapters", "-H", header)
        assert code == 0
        assert [adapter["name"] for adapter in json.loads(out)["adapters"]] == ["json", "shout"]
