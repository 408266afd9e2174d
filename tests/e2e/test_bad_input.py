"""Bad input gets a typed error that names what is wrong, and running requests don't notice."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from safetensors.torch import load_file, save_file

from polygraft_api.v1 import adapters_pb2 as ap
from polygraft_api.v1 import inference_pb2 as pb
from tests.e2e.conftest import Live

Code = grpc.StatusCode
WEIGHTS = "adapter_model.safetensors"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


async def refused(call: Any) -> tuple[grpc.StatusCode, str, list[str], str]:
    """Code, text, fields and reason of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)
    fields, reason = [], ""
    for packed in status.details if status else ():
        bad, info = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
        if packed.Unpack(bad):
            fields += [violation.field for violation in bad.field_violations]
        if packed.Unpack(info):
            reason = info.reason
    return caught.value.code(), caught.value.details() or "", fields, reason


@pytest.fixture
async def undisturbed(live: Live) -> AsyncIterator[Live]:
    """A server on which the base and two adapters answer while the test does its worst."""
    names = ["", "lora", "p-tuning"]
    expected = [await live.neighbour(name) for name in names]
    running = asyncio.gather(*(live.neighbour(name) for name in names))
    await asyncio.sleep(0.01)
    yield live
    assert await running == expected
    assert live.handle.failure is None


def sampling(**options: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="hi", sampling=pb.SamplingOptions(**options))


def stopping(**options: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="hi", stopping=pb.StoppingOptions(**options))


def several(*names: str, **options: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="hi", adapters=[pb.AdapterRef(name=name) for name in names], **options)


NAN = float("nan")
LINEAR = pb.COMBINATION_TYPE_LINEAR
BAD_REQUESTS: dict[str, tuple[pb.GenerateRequest, grpc.StatusCode, str]] = {
    "unknown adapter": (pb.GenerateRequest(prompt="hi", adapter="nobody"), Code.NOT_FOUND, ""),
    "unknown generation": (
        pb.GenerateRequest(prompt="hi", adapters=[pb.AdapterRef(name="lora", generation=999)]),
        Code.NOT_FOUND,
        "",
    ),
    "name with ../": (pb.GenerateRequest(prompt="hi", adapter="../lora"), Code.INVALID_ARGUMENT, "adapter"),
    "name with @": (pb.GenerateRequest(prompt="hi", adapter="lora@2"), Code.INVALID_ARGUMENT, "adapter"),
    "no input": (pb.GenerateRequest(), Code.INVALID_ARGUMENT, "input"),
    "empty prompt": (pb.GenerateRequest(prompt=""), Code.INVALID_ARGUMENT, "prompt"),
    "no token ids": (pb.GenerateRequest(token_ids=pb.TokenIds()), Code.INVALID_ARGUMENT, "token_ids.ids"),
    "token id out of range": (
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2, 288])),
        Code.INVALID_ARGUMENT,
        "token_ids.ids[2]",
    ),
    "prompt too long": (pb.GenerateRequest(prompt="x" * 300), Code.INVALID_ARGUMENT, "prompt"),
    "prompt and output too long": (stopping(max_new_tokens=255), Code.INVALID_ARGUMENT, "prompt"),
    "temperature below 0": (sampling(temperature=-1), Code.INVALID_ARGUMENT, "sampling.temperature"),
    "temperature not a number": (sampling(temperature=NAN), Code.INVALID_ARGUMENT, "sampling.temperature"),
    "top_p of 0": (sampling(top_p=0), Code.INVALID_ARGUMENT, "sampling.top_p"),
    "min_p above 1": (sampling(min_p=1.5), Code.INVALID_ARGUMENT, "sampling.min_p"),
    "seed too large": (sampling(seed=2**63), Code.INVALID_ARGUMENT, "sampling.seed"),
    "no new tokens": (stopping(max_new_tokens=0), Code.INVALID_ARGUMENT, "stopping.max_new_tokens"),
    "more least than most": (
        stopping(max_new_tokens=2, min_new_tokens=3),
        Code.INVALID_ARGUMENT,
        "stopping.min_new_tokens",
    ),
    "empty stop sequence": (
        stopping(stop_sequences=[""]),
        Code.INVALID_ARGUMENT,
        "stopping.stop_sequences[0]",
    ),
    "huge stop sequence": (
        stopping(stop_sequences=["x" * 100_000]),
        Code.INVALID_ARGUMENT,
        "stopping.stop_sequences[0]",
    ),
    "stop token out of range": (
        stopping(stop_token_ids=[288]),
        Code.INVALID_ARGUMENT,
        "stopping.stop_token_ids[0]",
    ),
    "time limit of 0": (stopping(time_limit=0), Code.INVALID_ARGUMENT, "stopping.time_limit"),
    "empty chat": (pb.GenerateRequest(chat=pb.Chat()), Code.INVALID_ARGUMENT, "chat.messages"),
    "penalty of 0": (
        sampling(repetition_penalty=0),
        Code.INVALID_ARGUMENT,
        "sampling.repetition_penalty",
    ),
    "bias out of range": (
        sampling(logit_bias={288: 1.0}),
        Code.INVALID_ARGUMENT,
        "sampling.logit_bias[288]",
    ),
    "merged base": (
        pb.GenerateRequest(prompt="hi", lora_path=pb.LORA_PATH_MERGED),
        Code.INVALID_ARGUMENT,
        "lora_path",
    ),
    "merged prefix": (
        pb.GenerateRequest(prompt="hi", adapter="prefix", lora_path=pb.LORA_PATH_MERGED),
        Code.FAILED_PRECONDITION,
        "",
    ),
    "an adapter and adapters": (
        pb.GenerateRequest(prompt="hi", adapter="lora", adapters=[pb.AdapterRef(name="lora")]),
        Code.INVALID_ARGUMENT,
        "adapters",
    ),
    "an adapter twice": (several("lora", "lora"), Code.INVALID_ARGUMENT, "adapters[1].name"),
    "two with virtual tokens": (several("lora", "prefix", "prompt"), Code.INVALID_ARGUMENT, "adapters[2]"),
    "one that isn't there": (several("lora", "nobody"), Code.NOT_FOUND, ""),
    "a weight without a meaning": (
        pb.GenerateRequest(prompt="hi", adapters=[pb.AdapterRef(name="prefix", weight=0.5)]),
        Code.INVALID_ARGUMENT,
        "adapters[0].weight",
    ),
    "a combination of nothing": (
        pb.GenerateRequest(prompt="hi", combination_type=LINEAR),
        Code.INVALID_ARGUMENT,
        "combination_type",
    ),
    "a combination of several kinds": (
        several("lora", "prefix", combination_type=LINEAR),
        Code.INVALID_ARGUMENT,
        "adapters[1]",
    ),
    "a combination of several ranks": (
        several("lora", "rslora-patterns", combination_type=LINEAR),
        Code.INVALID_ARGUMENT,
        "adapters[1]",
    ),
    "a combination merged": (
        several("lora", combination_type=LINEAR, lora_path=pb.LORA_PATH_MERGED),
        Code.INVALID_ARGUMENT,
        "lora_path",
    ),
    "several merged": (
        several("lora", "lora-bias", lora_path=pb.LORA_PATH_MERGED),
        Code.INVALID_ARGUMENT,
        "lora_path",
    ),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_bad_request(undisturbed: Live, name: str) -> None:
    request, expected, field = BAD_REQUESTS[name]
    for call in (
        undisturbed.inference.Generate(request),
        undisturbed.inference.GenerateStream(request).read(),
    ):
        code, _, fields, reason = await refused(call)
        assert code == expected
        assert reason
        if field:
            assert fields == [field]


async def test_the_numbers_of_a_prompt_that_is_too_long(undisturbed: Live) -> None:
    request = pb.GenerateRequest(prompt="x" * 200, adapter="p-tuning", stopping={"max_new_tokens": 100})
    _, text, _, reason = await refused(undisturbed.inference.Generate(request))
    assert reason == "CONTEXT_LENGTH_EXCEEDED"
    assert "17 virtual tokens + 200 prompt tokens + 100 new tokens = 317" in text
    assert "256" in text


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("the-pickle-was-run",)


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))


def pickle_in_disguise(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb()))


def set_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q0}.lora_A.weight"][0, 0] = float("nan")


def other_model(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        if "lora_A" in name:
            tensors[name] = torch.ones(4, 48)


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]),
        f"{WEIGHTS} is cut short or damaged",
    ),
    "pickle": (pickle_only, "is a pickle"),
    "pickle in disguise": (pickle_in_disguise, f"{WEIGHTS} is a pickle under another name"),
    "nan": (lambda f: edit_tensors(f, set_nan), "holds NaN or infinity"),
    "missing tensor": (
        lambda f: edit_tensors(f, lambda t: t.pop(f"{Q0}.lora_B.weight")),
        f"tensor {Q0}.lora_B.weight is missing",
    ),
    "extra tensor": (
        lambda f: edit_tensors(f, lambda t: t.update(extra=torch.ones(1))),
        "tensor extra isn't expected",
    ),
    "another model's": (lambda f: edit_tensors(f, other_model), "has shape [4, 48], expected [4, 64]"),
    "no such target": (
        lambda f: edit_config(f, target_modules=["nowhere"]),
        "target 'nowhere' matches no module",
    ),
    "unserved option": (lambda f: edit_config(f, use_qalora=True), "use_qalora=True isn't served"),
    "unknown kind": (lambda f: edit_config(f, peft_type="BONE"), "peft_type 'BONE' isn't served"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "is not JSON"),
    "no folder": (lambda f: f.rename(f.with_name("elsewhere")), "no such folder"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
async def test_bad_folder(undisturbed: Live, name: str) -> None:
    damage, text = BAD_FOLDERS[name]
    folder = undisturbed.store / "damaged"
    (undisturbed.store / "lora").rename(folder)
    damage(folder)
    code, details, fields, reason = await refused(
        undisturbed.adapters.LoadAdapter(ap.LoadAdapterRequest(name="damaged"))
    )
    assert code == Code.INVALID_ARGUMENT
    assert reason == "ADAPTER_INVALID"
    assert fields
    assert text in details
    assert not Path("the-pickle-was-run").exists()
    code, *_ = await refused(
        undisturbed.inference.Generate(pb.GenerateRequest(prompt="hi", adapter="damaged"))
    )
    assert code == Code.NOT_FOUND


async def test_links_out_of_the_store_are_refused(undisturbed: Live, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (undisturbed.store / "prefix").rename(outside)
    (undisturbed.store / "linked").symlink_to(outside)
    inside = undisturbed.store / "half"
    inside.mkdir()
    (inside / "adapter_config.json").write_text((outside / "adapter_config.json").read_text())
    (inside / WEIGHTS).symlink_to(outside / WEIGHTS)
    for name, source in (
        ("linked", ""),
        ("half", ""),
        ("x", "../outside"),
        ("x", str(outside)),
        ("x", "a/../.."),
    ):
        code, _, fields, _ = await refused(
            undisturbed.adapters.LoadAdapter(ap.LoadAdapterRequest(name=name, source=source))
        )
        assert (code, fields) == (Code.INVALID_ARGUMENT, ["source"])


@pytest.mark.parametrize("name", ["../lora", "lora@1", "", "a/b", ".hidden", "x" * 129, "ü"])
async def test_bad_adapter_names(undisturbed: Live, name: str) -> None:
    code, _, fields, _ = await refused(undisturbed.adapters.LoadAdapter(ap.LoadAdapterRequest(name=name)))
    assert (code, fields) == (Code.INVALID_ARGUMENT, ["name"])


async def test_other_content_under_a_name_that_is_taken(undisturbed: Live) -> None:
    request = ap.LoadAdapterRequest(name="lora", source="lora-regex")
    code, *_ = await refused(undisturbed.adapters.LoadAdapter(request))
    assert code == Code.ALREADY_EXISTS
    same = await undisturbed.adapters.LoadAdapter(ap.LoadAdapterRequest(name="lora"))
    assert same.adapter.state == ap.ADAPTER_STATE_READY
