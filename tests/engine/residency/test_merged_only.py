"""Adapters that are served on merged copies alone: loading them, asking for them, and what they leave to others."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polygraft.engine.engine import Engine
from polygraft.errors import AdapterUnavailable, InvalidRequest, ResourceExhausted
from polygraft_types.adapters import AdapterInfo, AdapterState, MergeState
from polygraft_types.requests import AdapterRef, LoraPath, Request, ScoreRequest, StoppingParams
from tests.engines import greedy, make_engine, run_greedy
from tests.peft_folders import KINDS, MERGED_ONLY

PROMPT = list(range(30, 60))


@pytest.fixture
def store(adapter_store: Callable[[str], Path], tmp_path: Path) -> Path:
    """Three of them beside others."""
    for kind in ("fourierft", "hira", "road", "lora", "prefix"):
        shutil.copytree(adapter_store("llama") / kind, tmp_path / "store" / kind)
    return tmp_path / "store"


def asked(path: LoraPath, adapter: str = "hira", *, required: bool = True) -> Request:
    return Request(
        "r",
        tuple(PROMPT),
        (AdapterRef(adapter),),
        path,
        required,
        stopping=StoppingParams(max_new_tokens=8, ignore_eos=True),
    )


def answer(engine: Engine, request: Request) -> tuple[list[int], LoraPath]:
    (outputs,) = engine.generate([request])
    assert outputs[-1].finished is not None, outputs[-1].error
    return [token for output in outputs for token in output.token_ids], outputs[-1].finished.path


def test_loading_tries_it_on_a_copy(llama: Path, store: Path) -> None:
    engine = make_engine(llama, store)
    for name in ("fourierft", "hira", "road"):
        info = engine.adapters.registry.get(name)
        assert (info.state, info.primitives, info.warnings) == (AdapterState.READY, ("dense",), ())
        assert info.merged_only
        assert info.mergeable
        assert info.merged is not None
        assert (info.merged.state, info.merged.pinned) == (MergeState.READY, False)
    assert not engine.adapters.registry.get("lora").merged_only
    engine.check_integrity()
    # There is no other path to compare its logits with.
    engine.background.wake_resting()
    engine.finish_background()
    info = engine.adapters.registry.get("hira")
    assert info.merged is not None
    assert info.merged.deviation is None


def test_any_path_that_is_left_to_the_server_is_the_merged_one(llama: Path, store: Path) -> None:
    engine = make_engine(llama, store)
    expected = answer(engine, asked(LoraPath.MERGED))
    assert expected[1] is LoraPath.MERGED
    assert answer(engine, asked(LoraPath.AUTO)) == expected
    assert answer(engine, asked(LoraPath.AUTO, required=False)) == expected
    assert answer(engine, asked(LoraPath.UNMERGED, required=False)) == expected
    assert expected[0] != answer(engine, greedy("base", PROMPT, None, 8))[0]


def test_demanding_the_other_path_is_refused_with_the_reason(llama: Path, store: Path) -> None:
    engine = make_engine(llama, store)
    score = ScoreRequest(
        "s", tuple(PROMPT), (tuple(PROMPT[:3]),), (AdapterRef("hira"),), LoraPath.UNMERGED, path_required=True
    )
    for request in (asked(LoraPath.UNMERGED), score):
        with pytest.raises(
            AdapterUnavailable, match="hira changes the base's weights by more than a low rank"
        ):
            engine.submit(request)
    assert engine.adapters.registry.get("hira").running_requests == 0
    engine.check_integrity()
    scored = ScoreRequest("s", tuple(PROMPT), (tuple(PROMPT[:3]),), (AdapterRef("hira"),))
    (outputs,) = engine.generate([scored])
    assert outputs[-1].finished is not None, outputs[-1].error
    assert outputs[-1].finished.path is LoraPath.MERGED


def test_it_is_alone_and_as_it_is(llama: Path, store: Path) -> None:
    engine = make_engine(llama, store)
    for refs, why in (
        ((AdapterRef("lora"), AdapterRef("hira")), "a merged copy has one adapter's weights in it"),
        ((AdapterRef("hira", weight=0.5),), "must be 1 for 'hira'"),
    ):
        with pytest.raises(InvalidRequest, match=why):
            engine.submit(Request("r", tuple(PROMPT), refs))
    engine.check_integrity()


@pytest.mark.parametrize("requantize", [False, True], ids=["wide", "requantized"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "nf4"])
def test_beside_mixed_steps_everybody_gets_his_own_answer(
    llama: Path, store: Path, precision: str, requantize: bool
) -> None:
    engine = make_engine(llama, store, precision=precision, requantize_merged=requantize)
    names = [None, "hira", "lora", "fourierft", "prefix", "road", "hira"]
    requests = [greedy(f"{at}", PROMPT, name, 12) for at, name in enumerate(names)]
    alone = [run_greedy(engine, [request])[0] for request in requests]
    assert run_greedy(engine, requests) == alone


def test_torch_operators_give_the_same(llama: Path, store: Path) -> None:
    native, torch_only = make_engine(llama, store), make_engine(llama, store, native=False)
    requests = [greedy(name, PROMPT, name, 12) for name in ("hira", "fourierft", "road")]
    assert run_greedy(native, requests) == run_greedy(torch_only, requests)


def test_a_copy_that_gave_way_is_made_again(llama: Path, store: Path) -> None:
    engine = make_engine(llama, store)
    requests = [greedy(name, PROMPT, name, 8) for name in ("hira", "fourierft", "road")]
    expected = [run_greedy(engine, [request])[0] for request in requests]
    sizes = [
        engine.copies.bytes_for(engine.adapters.registry.current(n)) for n in ("hira", "fourierft", "road")
    ]
    small = make_engine(llama, store, merged_bytes=max(sizes))
    for _ in range(2):
        assert [run_greedy(small, [request])[0] for request in requests] == expected
    assert run_greedy(small, requests) == expected
    assert small.copies.count == 1


def test_one_of_which_there_can_be_no_copy_is_not_loaded(llama: Path, store: Path) -> None:
    engine = make_engine(llama, store, merged_bytes=1000)
    for name in ("fourierft", "hira", "road"):
        info = engine.adapters.registry.get(name)
        assert info.state is AdapterState.FAILED
        (problem,) = info.problems
        assert problem.startswith(f"{name} is served merged only, and a merged copy takes ")
        assert problem.endswith(" bytes, --merged-bytes allows 1000")
    assert engine.adapters.registry.get("lora").state is AdapterState.READY
    engine.check_integrity()
    run_greedy(engine, [greedy("r", PROMPT, "lora", 4)])


def test_pinned_copies_leave_no_room_for_loading_one(llama: Path, store: Path) -> None:
    sizes = make_engine(llama, store)
    room = max(sizes.copies.bytes_for(sizes.adapters.registry.current(name)) for name in ("hira", "lora"))
    (store / "hira").rename(store.parent / "later")
    for name in ("fourierft", "road"):
        shutil.rmtree(store / name)
    engine = make_engine(llama, store, merged_bytes=room)
    pinned: Future[AdapterInfo] = Future()
    engine.merging.update("lora", True, pinned)
    while not pinned.done():
        engine.step()
    (store.parent / "later").rename(store / "hira")
    loaded: Future[AdapterInfo] = Future()
    engine.adapters.load("hira", "hira", engine.adapters.store.read("hira", "hira"), loaded, reload=False)
    while not loaded.done():
        engine.step()
    assert isinstance(loaded.exception(), ResourceExhausted)
    assert "not merged: pinned copies take" in str(loaded.exception())
    engine.check_integrity()
    run_greedy(engine, [greedy("r", PROMPT, "lora", 4)])


def test_unloading_leaves_nothing(llama: Path, store: Path) -> None:
    engine = make_engine(llama, store)
    before = engine.copies.bytes
    gone: Future[AdapterInfo] = Future()
    engine.adapters.unload("hira", gone, wait=True)
    while not gone.done():
        engine.step()
    assert engine.copies.bytes < before
    assert engine.runner._bank.resident == 3  # the prefix has no weights in it
    engine.check_integrity()


def test_weights_that_are_not_finite_are_refused(llama: Path, store: Path) -> None:
    file = store / "hira" / "adapter_model.safetensors"
    tensors = {name: torch.full_like(t, 3e38) for name, t in load_file(file).items()}
    save_file(tensors, file)
    engine = make_engine(llama, store)
    info = engine.adapters.registry.get("hira")
    assert (info.state, info.problems) == (AdapterState.FAILED, ("its logits are not finite",))
    engine.check_integrity()
    run_greedy(engine, [greedy("r", PROMPT, "road", 4)])


def test_the_tests_list_of_these_kinds_is_the_servers(
    llama: Path, adapter_store: Callable[[str], Path]
) -> None:
    engine = make_engine(llama, adapter_store("llama"))
    found = [info.name for info in engine.adapters.registry.list() if info.merged_only]
    assert sorted(found) == sorted(MERGED_ONLY)
    assert set(found) < set(KINDS)
