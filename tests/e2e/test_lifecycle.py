"""Loading, unloading and cancelling on a real engine while requests run."""

from __future__ import annotations

import asyncio
import shutil
import time

import grpc
import pytest

from polygraft.engine.engine import StepResult
from polygraft_api.v1 import adapters_pb2 as ap
from polygraft_api.v1 import inference_pb2 as pb
from polygraft_api.v1 import inference_pb2_grpc
from tests.e2e.conftest import Live


@pytest.fixture(autouse=True)
def unhurried(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that take so long that a long request is still running when something happens to it."""
    engine = live.handle._engine
    step = engine.step

    def slow_step() -> StepResult:
        time.sleep(0.003)
        return step()

    monkeypatch.setattr(engine, "step", slow_step)


def long_request(adapter: str = "") -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt="go on", adapter=adapter, stopping={"max_new_tokens": 200, "ignore_eos": True}
    )


async def idle(live: Live) -> None:
    """Wait until the engine holds nothing; it must get there within a few steps."""
    scheduler = live.handle._engine.scheduler
    for _ in range(400):
        if not scheduler.has_work:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("something is still held")


@pytest.mark.parametrize("how", ["cancel", "deadline", "dropped channel"])
async def test_whoever_leaves_frees_what_was_held(live: Live, how: str) -> None:
    channel = grpc.aio.insecure_channel(live.address)
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    stream = stub.GenerateStream(long_request("p-tuning"), timeout=0.3 if how == "deadline" else None)
    await stream.read()
    if how == "cancel":
        stream.cancel()
    elif how == "deadline":
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await stream.read():
                pass
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    else:
        await channel.close()
    await idle(live)
    assert live.handle.get_adapter("p-tuning").running_requests == 0
    await channel.close()


async def test_unload_waits_for_running_requests_or_refuses(live: Live) -> None:
    stream = live.inference.GenerateStream(long_request("lora"))
    await stream.read()
    refuse = ap.UnloadAdapterRequest(name="lora", mode=ap.UNLOAD_MODE_REFUSE)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await live.adapters.UnloadAdapter(refuse)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    unloading = asyncio.ensure_future(live.adapters.UnloadAdapter(ap.UnloadAdapterRequest(name="lora")))
    while live.handle.get_adapter("lora").state != "UNLOADING":
        await asyncio.sleep(0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await live.inference.Generate(long_request("lora"))
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert not unloading.done()
    chunks = 1
    while chunk := await stream.read():
        chunks += 1
        if chunk.HasField("final"):
            assert chunk.final.summary.usage.completion_tokens == 200
    await unloading
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await live.inference.Generate(long_request("lora"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_reload_serves_new_requests_with_new_weights_and_old_ones_with_old(live: Live) -> None:
    before, other = await live.neighbour("lora"), await live.neighbour("lora-regex")
    assert before != other
    running = asyncio.ensure_future(live.neighbour("lora"))
    await asyncio.sleep(0.01)
    shutil.rmtree(live.store / "lora")
    shutil.copytree(live.store / "lora-regex", live.store / "lora")
    generation = live.handle.get_adapter("lora").generation
    reloaded = await live.adapters.ReloadAdapter(ap.ReloadAdapterRequest(name="lora"))
    assert reloaded.adapter.generation > generation
    assert await live.neighbour("lora") == other
    assert await running == before
    again = await live.adapters.ReloadAdapter(ap.ReloadAdapterRequest(name="lora"))
    assert again.adapter.generation == reloaded.adapter.generation


async def test_a_failed_reload_leaves_the_old_generation_serving(live: Live) -> None:
    before = await live.neighbour("lora")
    (live.store / "lora" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await live.adapters.ReloadAdapter(ap.ReloadAdapterRequest(name="lora"))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert await live.neighbour("lora") == before


async def test_a_soft_prompt_can_be_read(live: Live) -> None:
    shown = await live.adapters.GetAdapter(ap.GetAdapterRequest(name="prompt", nearest_tokens=3))
    assert len(shown.nearest_tokens) == 6
    for near in shown.nearest_tokens:
        similarities = [token.similarity for token in near.tokens]
        assert len(similarities) == 3
        assert similarities == sorted(similarities, reverse=True)


async def test_an_answer_comes_in_pieces_that_add_up(live: Live) -> None:
    request = long_request("prefix")
    request.response.token_ids = True
    text, tokens = "", []
    async for chunk in live.inference.GenerateStream(request):
        text += chunk.text
        tokens += chunk.token_ids
        final = chunk.final if chunk.HasField("final") else None
    assert final is not None
    assert (final.text, list(final.token_ids)) == (text, tokens)
    whole = await live.inference.Generate(request)
    assert list(whole.token_ids) == tokens
    assert whole.summary.usage.virtual_tokens == 5
