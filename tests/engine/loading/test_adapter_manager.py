"""Adapters that come and go while requests run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from polygraft.adapters.files.folder import CONFIG, WEIGHTS, AdapterFolder
from polygraft.adapters.files.store import AdapterStore
from polygraft.base.loader import load_base
from polygraft.config import ServerConfig
from polygraft.engine.engine import Engine
from polygraft.engine.events import AdapterChange, AdapterEvent
from polygraft.engine.loading.load_memory import LOADS_AT_ONCE
from polygraft.engine.step_result import StepResult
from polygraft.errors import (
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    AdapterUnavailable,
    PolygraftError,
    ResourceExhausted,
)
from polygraft_types.adapters import AdapterState
from polygraft_types.requests import AdapterRef, Request, StoppingParams
from tests.engine.stores import change, copy_of, load, start_load, start_unload, strengthen
from tests.engines import greedy, make_engine, run_greedy

PROMPT = list(range(30, 60))


@pytest.fixture
def store(llama_store: Path, tmp_path: Path) -> Path:
    return copy_of(llama_store, tmp_path / "store", "lora", "prefix", "prompt")


@pytest.fixture
def engine(llama: Path, store: Path) -> Engine:
    return make_engine(llama, store)


def finish(engine: Engine) -> dict[str, list[int]]:
    """Tokens of every request, to the end of all."""
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.error is None
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    engine.check_integrity()
    return tokens


def at_generation(id: str, name: str, generation: int) -> Request:
    return Request(
        id,
        tuple(PROMPT),
        (AdapterRef(name, generation=generation),),
        stopping=StoppingParams(max_new_tokens=8, ignore_eos=True),
    )


def test_a_large_store_is_loaded_a_few_at_a_time(
    llama: Path, llama_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files of a thousand adapters in memory at once would be more than the adapters.
    names = [f"copy-{n}" for n in range(2 * LOADS_AT_ONCE + 3)]
    for name in names:
        shutil.copytree(llama_store / "lora", tmp_path / name)
    on_the_way: list[int] = []
    read = AdapterStore.read

    def counting(store: AdapterStore, name: str, source: str, most: int | None = None) -> AdapterFolder:
        states = [info.state for info in engine.adapters.registry.list()]
        on_the_way.append(states.count(AdapterState.LOADING))
        return read(store, name, source, most)

    monkeypatch.setattr(AdapterStore, "read", counting)
    engine = Engine(load_base(str(llama)), ServerConfig(adapters=tmp_path, kv_cache_bytes=2**20))
    engine.adapters.load_store()
    engine.finish_background()
    assert len(on_the_way) == len(names)
    assert max(on_the_way) == LOADS_AT_ONCE
    assert {info.name for info in engine.adapters.registry.list() if info.state is AdapterState.READY} == set(
        names
    )


def test_broken_folders_dont_stop_the_start_and_are_listed(
    llama: Path, llama_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = copy_of(llama_store, tmp_path / "store", "lora", "prefix")
    (store / "empty").mkdir()
    shutil.copytree(store / "lora", store / "cut")
    (store / "cut" / "adapter_model.safetensors").write_bytes(b"x")
    shutil.copytree(store / "lora", tmp_path / "outside")
    (store / "outside").symlink_to(tmp_path / "outside")
    (store / "a@b\n").mkdir()
    (store / "loop").symlink_to("loop")
    engine = make_engine(llama, store)
    states = {info.name: (info.state, info.problems) for info in engine.adapters.registry.list()}
    assert list(states) == ["a@b\\n", "cut", "empty", "loop", "lora", "outside", "prefix"]
    assert states["a@b\\n"][1] == (
        "an adapter's name must match [A-Za-z0-9][A-Za-z0-9._-]{0,127}; rename the folder",
    )
    assert {name for name, (state, _) in states.items() if state is AdapterState.READY} == {"lora", "prefix"}
    assert "is cut short" in states["cut"][1][0]
    assert states["empty"][1] == (
        "adapter_config.json is missing: this is no adapter's folder as PEFT or AdapterHub saves it",
    )
    assert "leads out of the store" in states["outside"][1][0]
    assert "the folder can't be opened: loop" in states["loop"][1][0]
    assert r"adapter a@b\n is not loaded: an adapter's name must match" in caplog.text
    with pytest.raises(AdapterUnavailable, match=r"adapter_config.json is missing"):
        engine.submit(greedy("r", PROMPT, "empty", 1))
    run_greedy(engine, [greedy("r", PROMPT, "lora", 3)])


def test_what_loading_tells(engine: Engine, store: Path) -> None:
    info = engine.adapters.registry.get("lora")
    assert (info.state, info.kind, info.source, info.rank) == (AdapterState.READY, "lora", "lora", 4)
    assert info.content_hash == engine.adapters.store.read("lora", "lora").content_hash
    assert info.load_seconds > 0
    assert info.warnings == info.problems == ()
    generations = [i.generation for i in engine.adapters.registry.list()]
    assert len(set(generations)) == 3


def test_an_adapter_whose_ranks_are_all_zero_changes_nothing(
    engine: Engine, store: Path, llama_store: Path
) -> None:
    folder = Path(shutil.copytree(llama_store / "adalora", store / "pruned"))
    config = json.loads((folder / CONFIG).read_text())
    config["rank_pattern"] = {name: [False] * config["init_r"] for name in config["rank_pattern"]}
    (folder / CONFIG).write_text(json.dumps(config))
    tensors = load_file(folder / WEIGHTS)
    empty = {name: t[:, :0] if "lora_B" in name else t[:0] for name, t in tensors.items()}
    save_file({name: t.contiguous() for name, t in empty.items()}, folder / WEIGHTS)
    info = load(engine, "pruned")
    assert (info.primitives, info.modules, info.rank) == ((), 0, 0)
    assert info.warnings == ("it changes nothing: its logits are the base's",)
    answers = run_greedy(engine, [greedy(f"{name}", PROMPT, name, 4) for name in ("pruned", None)])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_an_adapter_of_zeros_loads_with_a_warning(engine: Engine, store: Path, kind: str) -> None:
    shutil.copytree(store / kind, store / "zero")
    change(store / "zero", 0.0)
    warnings = load(engine, "zero").warnings
    # A prefix of zeros still draws attention away from the real tokens.
    assert warnings == (("it changes nothing: its logits are the base's",) if kind == "lora" else ())
    assert run_greedy(engine, [greedy("r", PROMPT, "zero", 4)])


def test_an_adapter_that_makes_infinities_is_refused(engine: Engine, store: Path) -> None:
    shutil.copytree(store / "lora", store / "huge")
    change(store / "huge", 1e25)
    expected = run_greedy(engine, [greedy("r", PROMPT, "lora", 4)])
    with pytest.raises(AdapterInvalid, match="its logits are not finite"):
        load(engine, "huge")
    with pytest.raises(AdapterNotFound):
        engine.adapters.registry.get("huge")
    assert run_greedy(engine, [greedy("r", PROMPT, "lora", 4)]) == expected


def test_loading_the_same_again_changes_nothing(engine: Engine, store: Path) -> None:
    before = engine.adapters.registry.get("lora")
    assert load(engine, "lora") == before
    assert load(engine, "lora", reload=True) == before
    shutil.copytree(store / "lora", store / "copy")
    assert load(engine, "lora", "copy") == before


def test_other_content_under_a_name_that_is_taken(engine: Engine, store: Path) -> None:
    before = engine.adapters.registry.get("lora")
    with pytest.raises(AdapterExists, match="'lora': loaded from 'lora' with other content"):
        load(engine, "lora", "prefix")
    assert engine.adapters.registry.get("lora") == before


def test_a_store_behind_a_link_that_is_led_elsewhere(llama: Path, llama_store: Path, tmp_path: Path) -> None:
    copy_of(llama_store, tmp_path / "rev-1", "lora")
    strengthen(copy_of(llama_store, tmp_path / "rev-2", "lora", "prefix") / "lora")
    current = tmp_path / "current"
    current.symlink_to("rev-1")
    engine = make_engine(llama, current)
    before = engine.adapters.registry.get("lora")
    (tmp_path / "new").symlink_to("rev-2")
    (tmp_path / "new").replace(current)
    shutil.rmtree(tmp_path / "rev-1")
    after = load(engine, "lora", reload=True)
    assert after.generation > before.generation
    assert after.content_hash != before.content_hash
    assert load(engine, "prefix").state is AdapterState.READY


def test_loads_of_the_same_at_once_are_one(engine: Engine, store: Path) -> None:
    shutil.copytree(store / "lora", store / "new")
    outcomes = [start_load(engine, "new") for _ in range(3)]
    assert not any(done.done() for done in outcomes)
    engine.finish_background()
    first, *others = [done.result(0) for done in outcomes]
    assert others == [first, first]
    assert first == load(engine, "new")


def test_loads_of_the_same_at_once_fail_together(engine: Engine, store: Path) -> None:
    shutil.copytree(store / "lora", store / "new")
    change(store / "new", use_qalora=True)
    outcomes = [start_load(engine, "new") for _ in range(2)]
    engine.finish_background()
    for done in outcomes:
        with pytest.raises(AdapterInvalid, match="use_qalora=True"):
            done.result(0)


def test_loads_of_different_content_at_once(engine: Engine, store: Path) -> None:
    first = start_load(engine, "new", "lora")
    with pytest.raises(AdapterUnavailable, match="'new': loading"):
        start_load(engine, "new", "prefix").result(0)
    engine.finish_background()
    assert first.result(0).kind == "lora"


def test_loading_while_requests_run_changes_no_token(llama: Path, llama_store: Path, tmp_path: Path) -> None:
    store = copy_of(llama_store, tmp_path / "s", "lora", "prefix", "prompt")
    engine = make_engine(llama, store)
    requests = [greedy(str(name), PROMPT, name, 40) for name in (None, "lora", "prefix", "prompt")]
    expected = run_greedy(engine, requests)
    copy_of(llama_store, store, "lora-bias", "rslora-patterns", "p-tuning")
    for request in requests:
        engine.submit(request)
    tokens: dict[str, list[int]] = {}
    loads = []
    for _ in range(200):
        for output in engine.step().outputs:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
        if not loads:
            loads = [start_load(engine, kind) for kind in ("lora-bias", "rslora-patterns", "p-tuning")]
        # Steps of a tiny model are short, and their share of time as well: it is given more.
        engine.background.run_after_step(1.0)
        if not engine.has_work:
            break
    assert [tokens[request.id] for request in requests] == expected
    assert [done.result(0).state for done in loads] == [AdapterState.READY] * 3
    assert run_greedy(engine, requests) == expected


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_a_reload_while_requests_run_on_the_old_generation(engine: Engine, store: Path, kind: str) -> None:
    old = engine.adapters.registry.get(kind).generation
    [expected] = run_greedy(engine, [greedy("r", PROMPT, kind, 40)])
    engine.submit(greedy("old", PROMPT, kind, 40))
    strengthen(store / kind)
    tokens: dict[str, list[int]] = {}

    def step() -> set[int]:
        """The generations that shared it."""
        batch = {generation for sequence in engine.scheduler for generation in sequence.stack.generations}
        for output in engine.step().outputs:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
        return batch

    step()
    done = start_load(engine, kind, reload=True)
    while not done.done():
        step()
        engine.background.run_after_step(1.0)
    new = done.result(0).generation
    assert new > old
    engine.submit(greedy("new", PROMPT, kind, 40))
    engine.submit(at_generation("again", kind, old))
    assert step() == {old, new}
    while engine.has_work:
        step()
    engine.check_integrity()
    assert tokens["old"] == expected
    assert tokens["again"] == expected[:8]
    assert tokens["new"] != expected
    assert run_greedy(engine, [greedy("r", PROMPT, kind, 40)]) == [tokens["new"]]
    with pytest.raises(AdapterNotFound, match=f"generation {old} isn't loaded"):
        engine.submit(at_generation("late", kind, old))
    assert engine.adapters._bank.resident == 1


def test_a_reload_that_fails_leaves_the_old_one_serving(engine: Engine, store: Path) -> None:
    before = engine.adapters.registry.get("lora")
    expected = run_greedy(engine, [greedy("r", PROMPT, "lora", 5)])
    change(store / "lora", use_qalora=True)
    with pytest.raises(AdapterInvalid, match="use_qalora"):
        load(engine, "lora", reload=True)
    assert engine.adapters.registry.get("lora") == before
    assert run_greedy(engine, [greedy("r", PROMPT, "lora", 5)]) == expected


@pytest.mark.parametrize("wait", [True, False])
def test_an_unload_in_the_middle_of_a_reload_is_refused(engine: Engine, store: Path, wait: bool) -> None:
    strengthen(store / "lora")
    reloading = start_load(engine, "lora", reload=True)
    engine.background.run_after_step(1.0)
    assert not reloading.done()
    with pytest.raises(AdapterUnavailable, match="'lora': loading"):
        start_unload(engine, "lora", wait=wait).result(0)
    engine.finish_background()
    assert reloading.result(0).state is AdapterState.READY
    assert start_unload(engine, "lora").result(0).name == "lora"


def test_an_unload_waits_for_the_running_ones(engine: Engine) -> None:
    [expected] = run_greedy(engine, [greedy("r", PROMPT, "lora", 5)])
    engine.submit(greedy("r", PROMPT, "lora", 5))
    engine.submit(greedy("queued", PROMPT, "lora", 5))
    tokens = {output.request_id: list(output.token_ids) for output in engine.step().outputs}
    done = start_unload(engine, "lora")
    assert not done.done()
    with pytest.raises(AdapterUnavailable, match="being unloaded"):
        engine.submit(greedy("late", PROMPT, "lora", 5))
    for id, more in finish(engine).items():
        tokens[id] += more
    assert tokens == {"r": expected, "queued": expected}
    assert done.result(0).name == "lora"
    assert engine.adapters._bank.resident == 0
    with pytest.raises(AdapterNotFound):
        engine.adapters.registry.get("lora")
    assert load(engine, "lora").state is AdapterState.READY
    assert run_greedy(engine, [greedy("r", PROMPT, "lora", 5)]) == [expected]


def test_an_unload_that_doesnt_wait(engine: Engine) -> None:
    engine.submit(greedy("r", PROMPT, "lora", 5))
    with pytest.raises(AdapterUnavailable, match="in use by 1 running requests"):
        start_unload(engine, "lora", wait=False).result(0)
    finish(engine)
    assert start_unload(engine, "lora", wait=False).result(0).name == "lora"


def test_an_unload_ends_with_the_abort_of_the_last_request(engine: Engine) -> None:
    engine.submit(greedy("r", PROMPT, "lora", 50))
    engine.step()
    done = start_unload(engine, "lora")
    engine.abort("r")
    assert not engine.has_work
    result = engine.take_news(StepResult())
    assert done.result(0).running_requests == 0
    assert [(event.change, event.info.name) for event in result.events if isinstance(event, AdapterEvent)][
        -1
    ] == (
        AdapterChange.REMOVED,
        "lora",
    )
    assert result.occupancy == engine.occupancy


@pytest.mark.parametrize("act", ["abort", "reload", "unload"])
def test_what_is_held_is_told_also_where_no_step_follows(engine: Engine, store: Path, act: str) -> None:
    run_greedy(engine, [greedy("r", PROMPT, "prefix", 4)])
    engine.submit(greedy("r", PROMPT, "prefix", 50))
    told = engine.step().occupancy
    assert told == engine.occupancy
    engine.abort("r")
    if act == "reload":
        strengthen(store / "prefix")
        start_load(engine, "prefix", reload=True)
        while engine.has_work:
            told = engine.step().occupancy or told
    elif act == "unload":
        start_unload(engine, "prefix")
    told = engine.take_news(StepResult()).occupancy or told
    assert told == engine.occupancy


def test_unloading_one_that_failed(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "store" / "broken").mkdir(parents=True)
    engine = make_engine(llama, tmp_path / "store")
    engine.events.clear()
    assert start_unload(engine, "broken").result(0).state is AdapterState.FAILED
    assert [
        (event.change, event.info.name) for event in engine.events if isinstance(event, AdapterEvent)
    ] == [(AdapterChange.REMOVED, "broken")]
    assert engine.adapters.registry.list() == []


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_unloading_frees_the_shared_blocks(engine: Engine, kind: str) -> None:
    for name in ("prefix", "prompt"):
        start_unload(engine, name)
    load(engine, kind)
    expected = run_greedy(engine, [greedy("r", PROMPT, kind, 4)])
    assert engine.scheduler.pool.used == 1
    start_unload(engine, kind).result(0)
    assert engine.scheduler.pool.used == 0
    load(engine, kind)
    assert run_greedy(engine, [greedy("r", PROMPT, kind, 4)]) == expected


def test_idle_prefixes_give_way_and_come_back_right(llama: Path, llama_store: Path, tmp_path: Path) -> None:
    kinds = ["prefix", "prefix-projection", "prompt", "p-tuning"]
    store = copy_of(llama_store, tmp_path / "s", *kinds)
    roomy = make_engine(llama, store)
    requests = [greedy(kind, PROMPT, kind, 6) for kind in kinds]
    expected = run_greedy(roomy, requests)
    # 1 + 2 + 1 + 2 blocks of virtual tokens, and 3 for each request.
    engine = make_engine(llama, store, kv_cache_bytes=5 * 12_288)
    for _ in range(2):
        for request, tokens in zip(requests, expected, strict=True):
            assert run_greedy(engine, [request]) == [tokens]
        assert run_greedy(engine, [greedy("all", PROMPT, None, 50)])
        assert engine.scheduler.pool.used == 0
        assert run_greedy(engine, requests) == expected


def test_no_more_adapters_than_allowed(llama: Path, store: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(llama, store, max_adapters=2)
    assert [(info.name, info.state.value) for info in engine.adapters.registry.list()] == [
        ("lora", "READY"), ("prefix", "READY"), ("prompt", "FAILED"),
    ]  # fmt: skip
    why = "2 adapters are loaded, the limit is 2 (--max-adapters)"
    assert engine.adapters.registry.get("prompt").problems == (why,)
    assert f"adapter prompt is not loaded: {why}" in caplog.text
    with pytest.raises(AdapterUnavailable, match="the limit is 2"):
        engine.submit(greedy("r", PROMPT, "prompt", 1))
    with pytest.raises(ResourceExhausted, match="--max-adapters"):
        load(engine, "prompt")
    start_unload(engine, "lora")
    assert load(engine, "prompt").state is AdapterState.READY


@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    [
        ({"max_adapter_rank": 3}, "lora", "--max-adapter-rank"),
        ({"max_virtual_tokens": 4}, "prefix", "--max-virtual-tokens"),
        ({"kv_cache_bytes": 12_288}, "prefix", r"don't fit the KV cache of 16 tokens \(--kv-cache-bytes\)"),
        ({"max_adapter_bytes": 500}, "lora", "the limit is 500"),
    ],
)
def test_adapters_over_a_limit(
    llama: Path, store: Path, settings: dict[str, int], kind: str, text: str
) -> None:
    engine = make_engine(llama, store, **settings)
    with pytest.raises(AdapterInvalid, match=text):
        load(engine, kind)
    engine.check_integrity()


def test_whatever_goes_wrong_in_a_load_the_engine_lives(
    engine: Engine, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(store / "lora", store / "new")
    expected = run_greedy(engine, [greedy("r", PROMPT, "lora", 5)])
    bank = engine.adapters._bank
    real = bank.install

    def fail(compiled: object) -> int:
        raise RuntimeError("out of something")

    monkeypatch.setattr(bank, "install", fail)
    with pytest.raises(RuntimeError, match="out of something"):
        load(engine, "new")
    monkeypatch.setattr(bank, "install", real)
    assert run_greedy(engine, [greedy("r", PROMPT, "lora", 5)]) == expected
    assert load(engine, "new").state is AdapterState.READY


HOSTILE: list[tuple[str, Callable[[dict[str, object]], object]]] = [
    ("not JSON", lambda config: "{"),
    ("task_type", lambda config: json.dumps({**config, "task_type": ["x"]})),
    ("base_model_name_or_path", lambda config: json.dumps({**config, "base_model_name_or_path": 5})),
    ("isn't valid", lambda config: json.dumps({**config, "r": 10**400})),
    ("isn't valid", lambda config: json.dumps({**config, "lora_alpha": float("nan")})),
    ("use_qalora=[[[[", lambda config: json.dumps({**config, "use_qalora": [[[[[]]]]]})),
]


@pytest.mark.parametrize(("text", "write"), HOSTILE, ids=[text for text, _ in HOSTILE])
def test_hostile_configurations_end_in_a_typed_error_and_disturb_nobody(
    engine: Engine, store: Path, text: str, write: Callable[[dict[str, object]], str]
) -> None:
    [expected] = run_greedy(engine, [greedy("r", PROMPT, "lora", 6)])
    shutil.copytree(store / "lora", store / "bad")
    path = store / "bad" / "adapter_config.json"
    path.write_text(write(json.loads(path.read_text())))
    engine.submit(greedy("r", PROMPT, "lora", 6))
    try:
        error = None
        done = start_load(engine, "bad")
    except PolygraftError as at_once:
        error = at_once
    assert finish(engine) == {"r": expected}
    error = error or done.exception(0)
    assert isinstance(error, AdapterInvalid)
    assert text in str(error)


@pytest.mark.parametrize("linked", [False, True])
def test_a_store_that_is_an_adapters_own_folder_is_served(
    llama: Path, llama_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, linked: bool
) -> None:
    folder = llama_store / "lora"
    if linked:
        folder = tmp_path / "current"
        folder.symlink_to(llama_store / "lora")
    with caplog.at_level("INFO"):
        engine = make_engine(llama, folder)
    (info,) = engine.adapters.registry.list()
    assert (info.name, info.state) == (folder.name, AdapterState.READY)
    assert f"a single adapter's folder: it is served as {folder.name}" in caplog.text
    with pytest.raises(PolygraftError):
        engine.adapters.store.read("prefix", "../prefix")


def test_a_store_without_folders_is_told_of(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    assert make_engine(llama, tmp_path).adapters.registry.list() == []
    assert "a folder without sub-folders: no adapter is loaded" in caplog.text
