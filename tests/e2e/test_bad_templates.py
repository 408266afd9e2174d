"""While an adapter's chat template is rendered for ever, everybody else is served."""

from __future__ import annotations

import asyncio
import json
import shutil

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from polygraft.engine.sandbox import pool
from polygraft_api.v1 import adapters_pb2 as ap
from polygraft_api.v1 import inference_pb2 as pb
from tests.e2e.conftest import Live
from tests.e2e.test_bad_input import Code, refused
from tests.tiny import byte_tokenizer

LOOPS = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
BAD = "{% if messages[0].content == 'now' %}" + LOOPS + "{% endif %}x"
GOOD = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
NOW = pb.Chat(messages=[pb.ChatMessage(role="user", content="now")])
HI = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
ONE = pb.StoppingOptions(max_new_tokens=1)


async def load(live: Live, name: str, **files: str) -> None:
    shutil.copytree(live.store / "lora", live.store / name)
    for file, content in files.items():
        (live.store / name / file.replace("__", ".")).write_text(content)
    await live.adapters.LoadAdapter(ap.LoadAdapterRequest(name=name))


async def test_nobody_else_waits_for_it(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    await load(live, "bad", chat_template__jinja=BAD)
    await load(live, "good", chat_template__jinja=GOOD)
    expected = await live.neighbour("lora")
    # So that it ends when the test ends it, however slow the machine is.
    monkeypatch.setattr(pool, "WAIT_SECONDS", 600.0)
    monkeypatch.setattr(pool.Workers.render, "__defaults__", (600.0,))
    workers = live.handle._engine.prompts._workers
    calls = [
        asyncio.ensure_future(
            refused(live.inference.Generate(pb.GenerateRequest(chat=NOW, adapter="bad", stopping=ONE)))
        )
        for _ in range(4)
    ]
    calls.append(
        asyncio.ensure_future(refused(live.inference.Tokenize(pb.TokenizeRequest(chat=NOW, adapter="bad"))))
    )
    while not any(workers._users):
        await asyncio.sleep(0.001)

    async with grpc.aio.insecure_channel(live.address) as channel:
        asked = health_pb2.HealthCheckRequest(service="")
        health = await health_pb2_grpc.HealthStub(channel).Check(asked)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    assert await live.neighbour("lora") == expected
    for _ in range(3):
        answer = await live.inference.Tokenize(pb.TokenizeRequest(chat=HI, adapter="good"))
        assert list(answer.token_ids) == byte_tokenizer()("<user>hi")["input_ids"]
    await live.inference.Generate(pb.GenerateRequest(chat=HI, adapter="good", stopping=ONE))
    assert not any(call.done() for call in calls)

    while not all(call.done() for call in calls):
        for lane, user in enumerate(workers._users):
            process = workers._lanes[lane]._process
            if user is not None and process is not None:
                process.kill()
        await asyncio.sleep(0.01)
    found = [call.result() for call in calls]
    assert {(code, reason) for code, _, _, reason in found} <= {
        (Code.FAILED_PRECONDITION, "CHAT_TEMPLATE_FAILED"),
        (Code.RESOURCE_EXHAUSTED, "RESOURCE_EXHAUSTED"),
    }
    assert any("the chat template of adapter 'bad' fails" in text for _, text, _, _ in found)
    unloaded = await live.adapters.UnloadAdapter(ap.UnloadAdapterRequest(name="bad"))
    assert unloaded.adapter.name == "bad"


async def test_a_template_that_was_stopped_costs_nobody_a_worker(live: Live) -> None:
    await load(live, "bad", chat_template__jinja=BAD)
    call = live.inference.Generate(pb.GenerateRequest(chat=NOW, adapter="bad", stopping=ONE))
    code, text, _, reason = await refused(call)
    assert (code, reason) == (Code.FAILED_PRECONDITION, "CHAT_TEMPLATE_FAILED")
    assert "used more than 2 s of CPU time" in text
    await live.inference.Generate(pb.GenerateRequest(chat=HI, adapter="bad", stopping=ONE))
    await live.adapters.UnloadAdapter(ap.UnloadAdapterRequest(name="bad"))


async def test_a_tokenizer_that_panics_is_a_load_that_fails(live: Live) -> None:
    content = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AQAAAAA="}
    shutil.copytree(live.store / "lora", live.store / "panics")
    (live.store / "panics" / "tokenizer.json").write_text(json.dumps(content))
    neighbour = asyncio.ensure_future(live.neighbour())
    code, text, _, reason = await refused(live.adapters.LoadAdapter(ap.LoadAdapterRequest(name="panics")))
    assert (code, reason) == (Code.INVALID_ARGUMENT, "ADAPTER_INVALID")
    assert "index out of bounds" in text
    assert await neighbour == await live.neighbour()
