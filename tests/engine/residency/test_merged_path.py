"""Requests on merged copies: the same answers, fair turns, and nothing left behind."""

from __future__ import annotations

import hashlib
import itertools
import random
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from polygraft.engine.engine import Engine
from polygraft.engine.events import PathDecision
from polygraft.engine.schedule.path_policy import ENTER_STEPS, LEAVE_STEPS, PathPolicy
from polygraft.errors import AdapterUnavailable, ResourceExhausted
from polygraft.layers.linear.linear import PackedLinear
from polygraft_types.adapters import AdapterInfo, MergeEvent, MergeOutcome, MergeState
from polygraft_types.answers import FinishReason
from polygraft_types.requests import AdapterRef, LoraPath, Request, StoppingParams
from tests.engines import greedy, make_engine, run_greedy
from tests.equivalence.reference import generate
from tests.peft_folders import KINDS, MERGED_ONLY
from tests.tiny import CONFIGS

PROMPT = list(range(30, 60))
MERGEABLE = [
    "lora",
    "lora-all-linear",
    "rslora-patterns",
    "lora-bias",
    "dora-biases",
    "lora-regex",
    "lora-layers",
    "lora-head",
    "lokr",
    "lokr-products",
    "oft",
    "oft-constrained",
    "boft",
    "hra",
    "ia3-shared-input",
]
# On GPT-2 these are on the head.
NO_CONV1D = ("lokr", "lokr-products", "oft", "oft-constrained", "boft", "hra")
PRECISIONS = ["float32", "bfloat16", "int8", "nf4"]


@pytest.fixture(scope="module")
def llama_store(adapter_store: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without those that are served merged only, of which loading makes copies: here, who has one is counted."""
    store = tmp_path_factory.mktemp("both-paths")
    for kind in KINDS:
        if kind not in MERGED_ONLY:
            shutil.copytree(adapter_store("llama") / kind, store / kind)
    return store


def asked(id: str, adapter: str | None, path: LoraPath, new_tokens: int = 8) -> Request:
    return Request(
        id,
        tuple(PROMPT),
        () if adapter is None else (AdapterRef(adapter),),
        path,
        path is LoraPath.MERGED,
        stopping=StoppingParams(max_new_tokens=new_tokens, ignore_eos=True),
    )


def merged(id: str, adapter: str, new_tokens: int = 8) -> Request:
    return asked(id, adapter, LoraPath.MERGED, new_tokens)


def settle(engine: Engine) -> None:
    engine.finish_background()
    while engine.has_work:
        engine.step()
    engine.check_integrity()


def tokens_of(engine: Engine, requests: list[Request]) -> list[list[int]]:
    found = []
    for outputs in engine.generate(requests):
        assert outputs[-1].finished is not None, outputs[-1].error
        assert outputs[-1].finished.reason is FinishReason.LENGTH
        found.append([token for output in outputs for token in output.token_ids])
    settle(engine)
    return found


def update(engine: Engine, name: str, *, merged: bool) -> AdapterInfo:
    done: Future[AdapterInfo] = Future()
    engine.merging.update(name, merged, done)
    while not done.done():
        engine.step()
    return done.result()


def hash_of_the_base(engine: Engine) -> str:
    """Of every tensor that belongs to the base, packed ones included."""
    digest = hashlib.sha256()
    tensors: dict[int, torch.Tensor] = {}
    for tensor in (*engine.base.model.parameters(), *engine.base.model.buffers()):
        tensors[tensor.data_ptr()] = tensor
    for module in engine.base.model.modules():
        if isinstance(module, PackedLinear):
            panels = module.group._panels
            for part in (*panels.tensors, *module.group._biases):
                if part is not None:
                    tensors[part.data_ptr()] = part
            digest.update(bytes(module.group._struct))
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_float32_tokens_are_those_of_side_paths_and_of_pefts_merge(
    tiny_model: Callable[[str], Path],
    adapter_store: Callable[[str], Path],
    architecture: str,
    native: bool,
) -> None:
    store = adapter_store(architecture)
    engine = make_engine(tiny_model(architecture), store, native=native)
    names = [name for name in MERGEABLE if (store / name).is_dir()]
    together = tokens_of(engine, [merged(name, name) for name in names])
    for name, got in zip(names, together, strict=True):
        model: Any = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_model(architecture), dtype=torch.float32),
            str(store / name),
        ).eval()
        # PEFT's own merge raises for a bias that the base's module has no place for, and on a tied head it
        # changes the embedding as well: there its unmerged answer is the reference.
        if name not in ("lora-bias", "lora-head", *(NO_CONV1D if architecture == "gpt2" else ())):
            model = model.merge_and_unload()
        expected = generate(model, PROMPT, 8).tokens
        assert got == expected, name
        assert tokens_of(engine, [greedy(name, PROMPT, name, 8)]) == [expected]
        assert tokens_of(engine, [merged(name, name)]) == [expected]


@pytest.mark.parametrize("requantize", [False, True], ids=["wide", "requantized"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_merged_beside_mixed_steps_changes_nobodys_tokens(
    llama: Path, llama_store: Path, precision: str, requantize: bool
) -> None:
    engine = make_engine(llama, llama_store, precision=precision, requantize_merged=requantize)
    others: list[Request] = [
        greedy(f"o{i}", PROMPT, name, 12) for i, name in enumerate([None, "lora", "prefix", "prompt"])
    ]
    alone = [tokens_of(engine, [request])[0] for request in others]
    own = [tokens_of(engine, [merged("m", name, 12)])[0] for name in ("lora", "lora-bias")]
    together = tokens_of(engine, [*others, merged("m1", "lora", 12), merged("m2", "lora-bias", 12)])
    assert together == alone + own
    dtype = (
        precision
        if requantize and precision in ("int8", "nf4")
        else "float32"
        if precision == "float32"
        else "bfloat16"
    )
    for name in ("lora", "lora-bias"):
        copy = engine.adapters.registry.get(name).merged
        assert copy is not None
        assert (copy.state, copy.dtype) == (MergeState.READY, dtype)
        assert copy.deviation is not None
        assert 0 <= copy.deviation.mean <= copy.deviation.largest
        if precision == "float32":
            assert copy.deviation.largest < 1e-3
            assert copy.deviation.greedy_agreement == 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_base_stays_bit_identical_through_hundreds_of_merges_and_evictions(
    llama: Path, llama_store: Path, precision: str
) -> None:
    engine = make_engine(llama, llama_store, precision=precision)
    settle(engine)
    copies = engine.copies
    names = [info.name for info in engine.adapters.registry.list() if info.mergeable]
    sizes = sorted(copies.bytes_for(engine.adapters.registry.current(name)) for name in names)
    copies.budget = sizes[-1] + sizes[0]  # two at most
    before = hash_of_the_base(engine)
    expected = tokens_of(engine, [greedy("base", PROMPT, None, 8)])
    # Their deviations once, so that what follows is merging alone.
    for name in names:
        tokens_of(engine, [merged("first", name, 1)])
    draw = random.Random(0)
    outcomes = []
    for at in range(200):
        several = draw.sample(names, draw.randint(1, 3))
        for name in several:
            engine.submit(merged(f"{at} {name}", name, 2))
        while engine.has_work:
            outcomes += [event.outcome for event in engine.step().events if isinstance(event, MergeEvent)]
        engine.check_integrity()
    assert outcomes.count(MergeOutcome.OK) > 150
    assert outcomes.count(MergeOutcome.EVICTED) > 150
    engine.runner._switch.use(None)
    assert hash_of_the_base(engine) == before
    assert tokens_of(engine, [greedy("base", PROMPT, None, 8)]) == expected


def test_the_least_recently_used_copy_gives_way_and_a_pinned_one_never(
    llama: Path, llama_store: Path
) -> None:
    engine = make_engine(llama, llama_store)
    names = ["lora", "lora-bias", "rslora-patterns"]
    sizes = {name: engine.copies.bytes_for(engine.adapters.registry.current(name)) for name in names}
    engine.copies.budget = sum(sizes.values()) - min(sizes.values()) // 2

    def states() -> dict[str, str]:
        infos = {name: engine.adapters.registry.get(name).merged for name in names}
        return {name: info.state.value for name, info in infos.items() if info is not None}

    tokens_of(engine, [merged("1", "lora")])
    tokens_of(engine, [merged("2", "lora-bias")])
    tokens_of(engine, [merged("3", "lora")])
    tokens_of(engine, [merged("4", "rslora-patterns")])
    assert states() == {"lora": "READY", "lora-bias": "EVICTED", "rslora-patterns": "READY"}
    info = update(engine, "rslora-patterns", merged=True)
    assert info.merged is not None
    assert info.merged.pinned
    tokens_of(engine, [merged("5", "lora")])
    tokens_of(engine, [merged("6", "lora-bias")])
    assert states() == {"lora": "EVICTED", "lora-bias": "READY", "rslora-patterns": "READY"}
    # Two pinned ones leave no room for the third: that request ends with an error, and so does pinning it.
    update(engine, "lora-bias", merged=True)
    engine.submit(merged("7", "lora"))
    outputs = [output for _ in range(20) for output in engine.step().outputs]
    [error] = [output.error for output in outputs]
    assert isinstance(error, ResourceExhausted)
    assert "pinned copies take" in str(error)
    assert states()["lora"] == "FAILED"
    settle(engine)
    with pytest.raises(ResourceExhausted, match="pinned copies take"):
        update(engine, "lora", merged=True)
    update(engine, "lora-bias", merged=False)
    assert tokens_of(engine, [merged("8", "lora")]) == run_greedy(engine, [greedy("9", PROMPT, "lora", 8)])
    assert states() == {"lora": "READY", "lora-bias": "EVICTED", "rslora-patterns": "READY"}


def test_what_is_said_of_a_copy_is_so_when_it_is_said(llama: Path, llama_store: Path) -> None:
    engine = make_engine(llama, llama_store)
    update(engine, "lora", merged=True)
    done: Future[AdapterInfo] = Future()
    engine.merging.update("lora", False, done)
    for info in (done.result(0), engine.adapters.registry.get("lora")):  # without a step between
        assert info.merged is not None
        assert not info.merged.pinned
    gone = Future[AdapterInfo]()
    engine.adapters.unload("lora", gone, wait=True)
    assert gone.result(0).merged is None


def test_what_never_fits_is_refused_at_once(llama: Path, llama_store: Path) -> None:
    engine = make_engine(llama, llama_store, merged_bytes=1000)
    with pytest.raises(
        AdapterUnavailable, match=r"a merged copy takes \d+ bytes, --merged-bytes allows 1000"
    ):
        engine.submit(merged("1", "lora"))
    with pytest.raises(AdapterUnavailable, match="--merged-bytes"):
        update(engine, "lora", merged=True)
    with pytest.raises(AdapterUnavailable, match="prefix_tuning has virtual tokens, which"):
        update(engine, "prefix", merged=True)
    # A default of the server's is no demand.
    by_default = [
        Request(
            name,
            tuple(PROMPT),
            (AdapterRef(name),),
            LoraPath.MERGED,
            stopping=StoppingParams(max_new_tokens=4),
        )
        for name in ("lora", "prefix")
    ]
    for outputs in engine.generate(by_default):
        assert outputs[-1].finished is not None
        assert outputs[-1].finished.path is LoraPath.UNMERGED
    assert engine.adapters.registry.get("lora").running_requests == 0
    settle(engine)


def test_merged_and_mixed_steps_take_turns_and_nobody_waits_longer_than_a_round(
    llama: Path, llama_store: Path
) -> None:
    engine = make_engine(llama, llama_store)
    names = ["lora", "lora-bias", "rslora-patterns"]
    for name in names:
        update(engine, name, merged=True)
    settle(engine)
    for at in range(6):
        engine.submit(greedy(f"mixed {at}", PROMPT, None, 40))
    for name in names:
        engine.submit(merged(name, name, 40))
    progress: dict[str, int] = {}
    waits: list[int] = []
    while engine.has_work:
        result = engine.step()
        if result.stats is not None:
            waits.append(result.stats.waited)
        for output in result.outputs:
            progress[output.request_id] = progress.get(output.request_id, 0) + len(output.token_ids)
        if len(progress) == 9 and all(0 < tokens < 40 for tokens in progress.values()):
            # Each request gets a token a round, whoever shares its steps.
            assert max(progress.values()) - min(progress.values()) <= 2
    assert max(waits) == len(names)
    assert set(progress.values()) == {40}


def test_a_long_waiting_request_is_not_overtaken_when_blocks_are_short(
    llama: Path, llama_store: Path
) -> None:
    """Its lane finds no room; what arrived later on other weights must not take what becomes free."""
    engine = make_engine(llama, llama_store, kv_cache_bytes=200_000, prefix_caching=False)
    update(engine, "lora", merged=True)
    settle(engine)
    blocks = engine.scheduler.pool.num_blocks
    long = blocks * engine.config.block_size * 3 // 4 - len(PROMPT)
    engine.submit(greedy("first", PROMPT, None, long))
    for _ in range(long // 2):
        engine.step()
    wide = list(itertools.islice(itertools.cycle(range(200)), blocks * engine.config.block_size * 5 // 8))
    engine.submit(
        Request(
            "second",
            tuple(wide),
            (AdapterRef("lora"),),
            LoraPath.MERGED,
            True,
            stopping=StoppingParams(max_new_tokens=4, ignore_eos=True),
        )
    )
    ends = []
    for at in itertools.count():
        if at % 4 == 0 and at < 400:
            engine.submit(greedy(f"later {at}", PROMPT, None, 4))
        for output in engine.step().outputs:
            if output.terminal:
                assert output.finished is not None, output.error
                ends.append(output.request_id)
        if not engine.has_work:
            break
    assert ends.index("second") <= 12
    settle(engine)


def test_a_preempted_sequence_keeps_its_path(llama: Path, llama_store: Path) -> None:
    engine = make_engine(llama, llama_store)
    expected = tokens_of(engine, [merged("m", "lora", 60), greedy("b", PROMPT, None, 60)])
    crowded = make_engine(llama, llama_store, kv_cache_bytes=75_000, prefix_caching=False)
    requests = [merged("m1", "lora", 60), greedy("b1", PROMPT, None, 60), merged("m2", "lora", 60)]
    outputs = crowded.generate(requests)
    finished = [o[-1].finished for o in outputs]
    assert sum(f.preemptions for f in finished if f) > 0
    assert [f and f.path for f in finished] == [LoraPath.MERGED, LoraPath.UNMERGED, LoraPath.MERGED]
    got = [[token for output in o for token in output.token_ids] for o in outputs]
    assert got == [expected[0], expected[1], expected[0]]
    settle(crowded)


def test_merged_keys_and_values_are_not_found_by_unmerged_requests(llama: Path, llama_store: Path) -> None:
    engine = make_engine(llama, llama_store)
    cached = []
    for path in (LoraPath.UNMERGED, LoraPath.MERGED, LoraPath.MERGED, LoraPath.UNMERGED):
        [outputs] = engine.generate([asked("r", "lora", path)])
        assert outputs[-1].finished is not None
        cached.append(outputs[-1].finished.usage.cached_tokens)
    assert cached == [0, 0, 16, 16]
    settle(engine)


def merging(engine: Engine, request: Request) -> None:
    """Submit, and stop in the middle of the merge."""
    engine.submit(request)
    adapter = engine.adapters.registry.current(request.adapters[0].name)
    engine.paths.decide()
    for _ in range(3):
        engine.background._run(1e-9)
    copy = engine.copies.peek(adapter)
    assert copy is not None
    assert copy.state is MergeState.MERGING
    assert copy.reserved


def test_a_merge_that_nobody_waits_for_any_more_is_given_up(llama: Path, llama_store: Path) -> None:
    engine = make_engine(llama, llama_store)
    before = hash_of_the_base(engine)
    merging(engine, merged("m", "lora"))
    [end] = engine.abort("m")
    assert end.finished is not None
    assert end.finished.reason is FinishReason.CANCELLED
    outcomes = []
    while engine.has_work:
        outcomes += [event.outcome for event in engine.step().events if isinstance(event, MergeEvent)]
    assert outcomes == [MergeOutcome.CANCELLED]
    assert engine.copies.bytes == 0
    assert engine.adapters.registry.get("lora").merged is None
    assert hash_of_the_base(engine) == before
    assert tokens_of(engine, [merged("m", "lora")]) == tokens_of(engine, [greedy("u", PROMPT, "lora", 8)])


def test_an_adapter_can_be_unloaded_while_it_is_merged(llama: Path, llama_store: Path) -> None:
    engine = make_engine(llama, llama_store)
    done: Future[AdapterInfo] = Future()
    engine.merging.update("lora", True, done)
    for _ in range(3):
        engine.background._run(1e-9)
    gone: Future[AdapterInfo] = Future()
    engine.adapters.unload("lora", gone, wait=True)
    while engine.has_work or not gone.done():
        engine.step()
    assert gone.result().name == "lora"
    with pytest.raises(AdapterUnavailable, match="given up while it was being merged"):
        done.result()
    assert engine.copies.bytes == 0
    settle(engine)


def test_an_adapter_can_be_gone_when_whoever_asked_for_its_copy_is_told(
    llama: Path, llama_store: Path
) -> None:
    engine = make_engine(llama, llama_store)
    adapter = engine.adapters.registry.current("lora")
    done: Future[AdapterInfo] = Future()
    engine.merging.update("lora", True, done)
    while (copy := engine.copies.peek(adapter)) is None or not copy.ready:
        engine.background._run(1e-9)
    assert not done.done()
    gone: Future[AdapterInfo] = Future()
    engine.adapters.unload("lora", gone, wait=True)
    assert gone.done()
    while engine.has_work:
        engine.step()
    with pytest.raises(AdapterUnavailable, match="given up while it was being merged"):
        done.result()
    assert engine.copies.bytes == 0
    settle(engine)


def test_an_adapter_can_be_unloaded_while_its_copy_is_measured(llama: Path, llama_store: Path) -> None:
    for steps in range(1, 8):
        engine = make_engine(llama, llama_store)
        update(engine, "lora", merged=True)
        adapter = engine.adapters.registry.current("lora")
        engine.background.wake_resting()
        for _ in range(steps):
            engine.background.run_idle(1e-9)
            if batch := engine._schedule():
                engine._postprocess(batch, engine.runner.run(batch))
        gone: Future[AdapterInfo] = Future()
        engine.adapters.unload("lora", gone, wait=True)
        while engine.has_work or not gone.done():
            engine.background.wake_resting()
            engine.step()
        assert engine.copies.bytes == 0
        assert engine.copies.needs_deviation(adapter)
        settle(engine)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_merge_that_fails_half_way_changes_nothing_for_others(
    llama: Path, llama_store: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    engine = make_engine(llama, llama_store)
    before = hash_of_the_base(engine)
    expected = tokens_of(engine, [greedy("n", PROMPT, "lora-bias", 20)])
    sites = engine.runner._bank.modules.merge_sites(engine.adapters.registry.current("lora").slot)

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("not enough memory: you tried to allocate 5 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(sites[after], "merge", fail)
        requests = [greedy("n", PROMPT, "lora-bias", 20), merged("m", "lora"), merged("m2", "lora")]
        neighbour, *failed = engine.generate(requests)
    assert [token for output in neighbour for token in output.token_ids] == expected[0]
    for outputs in failed:
        [end] = outputs
        assert isinstance(end.error, ResourceExhausted)
        assert "not enough memory" in str(end.error)
    copy = engine.adapters.registry.get("lora").merged
    assert copy is not None
    assert (copy.state, copy.problem) == (
        MergeState.FAILED,
        "not enough memory: you tried to allocate 5 bytes",
    )
    assert engine.copies.bytes == 0
    settle(engine)
    assert hash_of_the_base(engine) == before
    # The next one that asks has it made anew.
    assert tokens_of(engine, [merged("m", "lora")]) == tokens_of(engine, [greedy("u", PROMPT, "lora", 8)])


def test_auto_merges_a_hot_adapter_and_goes_back_when_the_mix_broadens(
    llama: Path, llama_store: Path
) -> None:
    engine = make_engine(llama, llama_store)
    hot = tokens_of(engine, [greedy("hot", PROMPT, "lora", 8)])[0]
    other = tokens_of(engine, [greedy("other", PROMPT, "lora-bias", 8)])[0]
    paths: dict[str, list[LoraPath]] = {"lora": [], "lora-bias": []}
    decisions: list[LoraPath] = []
    names: dict[str, str] = {}
    tokens: dict[str, list[int]] = {}

    def load(mix: list[str], rounds: int) -> None:
        running: dict[str, str] = {}
        for at in itertools.count():
            if at < rounds:
                for name in mix[len(running) :]:
                    id = f"r{len(names)}"
                    names[id] = running[id] = name
                    engine.submit(asked(id, name, LoraPath.AUTO))
            if not running:
                return
            result = engine.step()
            decisions.extend(event.path for event in result.events if isinstance(event, PathDecision))
            for output in result.outputs:
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
                if output.finished is not None:
                    paths[names[output.request_id]].append(output.finished.path)
                    del running[output.request_id]

    load(["lora"] * 4, 120)
    assert decisions == [LoraPath.MERGED]
    assert paths["lora"][0] is LoraPath.UNMERGED
    assert paths["lora"][-1] is LoraPath.MERGED
    load(["lora", "lora-bias"] * 2, 60)
    assert decisions == [LoraPath.MERGED, LoraPath.UNMERGED]
    assert paths["lora"][-1] is LoraPath.UNMERGED
    assert set(paths["lora-bias"]) == {LoraPath.UNMERGED}
    load(["lora"] * 4, 120)
    assert decisions == [LoraPath.MERGED, LoraPath.UNMERGED, LoraPath.MERGED]
    assert tokens == {id: hot if name == "lora" else other for id, name in names.items()}
    settle(engine)
    unloaded: Future[AdapterInfo] = Future()
    engine.adapters.unload("lora", unloaded, wait=True)
    settle(engine)
    assert unloaded.done()
    assert engine.paths.held is None


def test_auto_never_merges_where_a_copy_would_be_slower(llama: Path, llama_store: Path) -> None:
    engine = make_engine(llama, llama_store, precision="int8")
    for at in range(20):
        [outputs] = engine.generate([asked(f"{at}", "lora", LoraPath.AUTO)])
        assert outputs[-1].finished is not None
        assert outputs[-1].finished.path is LoraPath.UNMERGED
    assert engine.copies.count == 0


def test_the_policy_waits_for_what_lasts() -> None:
    policy = PathPolicy()
    for _ in range(ENTER_STEPS - 1):
        assert policy.observe({1: 16}, True) is None
    assert policy.observe({1: 15, 2: 1}, True) is None  # less than nearly all: it begins anew
    for _ in range(ENTER_STEPS - 1):
        assert policy.observe({1: 20, 0: 1}, True) is None
    assert policy.observe({1: 20, 0: 1}, True) == 1
    for _ in range(LEAVE_STEPS - 1):
        assert policy.observe({1: 8, 2: 8}, True) == 1
    assert policy.observe({1: 16}, True) == 1  # a passing crowd
    for _ in range(LEAVE_STEPS - 1):
        assert policy.observe({1: 8, 2: 8}, True) == 1
    assert policy.observe({1: 8, 2: 8}, True) is None
    for _ in range(2 * ENTER_STEPS):
        assert policy.observe({1: 16}, False) is None
    assert policy.observe({}, False) is None
