"""Names, generations and pins, apart from tensors."""

from __future__ import annotations

import threading
import time

import pytest

from polygraft.adapters.registry import Adapter, AdapterRegistry, ready_info
from polygraft.core.adapter_weights import AdapterWeights
from polygraft.errors import AdapterNotFound, AdapterUnavailable, ResourceExhausted
from polygraft.near_names import nearest_names
from polygraft_types.adapters import AdapterInfo, AdapterState
from polygraft_types.requests import AdapterRef

COMPILED = AdapterWeights("lora", 10)


def finish(registry: AdapterRegistry, name: str) -> Adapter:
    adapter = registry.new_adapter(name, COMPILED, slot=0)
    info = ready_info(
        adapter, name, modules=1, disk_bytes=1, content_hash="h", load_seconds=0.1, warnings=()
    )  # fmt: skip
    registry.finish_load(adapter, info)
    return adapter


def load(registry: AdapterRegistry, name: str = "a") -> Adapter:
    registry.begin_load(name, name)
    return finish(registry, name)


def gone(registry: AdapterRegistry) -> list[tuple[int, str | None]]:
    return [(adapter.generation, info.name if info else None) for adapter, info in registry.collect()]


def test_a_ready_adapter_is_resolved_and_pinned() -> None:
    registry = AdapterRegistry(4)
    adapter = load(registry)
    assert registry.resolve(AdapterRef("a")) is adapter
    assert registry.resolve(AdapterRef("a", generation=adapter.generation)) is adapter
    assert registry.get("a").running_requests == 2
    adapter.release()
    adapter.release()
    assert registry.get("a").running_requests == 0


def test_a_release_too_many_is_an_error() -> None:
    adapter = load(AdapterRegistry(4))
    with pytest.raises(AssertionError):
        adapter.release()


def test_generations_grow_over_all_names_and_are_never_reused() -> None:
    registry = AdapterRegistry(4)
    seen = [load(registry, name).generation for name in ("a", "b", "a")]
    registry.begin_unload("b", wait=True)
    registry.collect()
    seen.append(load(registry, "b").generation)
    assert seen == sorted(set(seen))


@pytest.mark.parametrize("name", ["other", "A", "a "])
def test_names_that_arent_registered(name: str) -> None:
    registry = AdapterRegistry(4)
    load(registry)
    for call in (
        lambda: registry.resolve(AdapterRef(name)),
        lambda: registry.get(name),
        lambda: registry.compiled(name),
        lambda: registry.begin_unload(name, wait=True),
    ):
        with pytest.raises(AdapterNotFound, match=repr(name)):
            call()


def test_while_it_loads_it_serves_nobody() -> None:
    registry = AdapterRegistry(4)
    registry.begin_load("a", "folder")
    assert registry.get("a") == AdapterInfo("a", AdapterState.LOADING, "folder")
    with pytest.raises(AdapterUnavailable, match="still loading"):
        registry.resolve(AdapterRef("a"))
    with pytest.raises(AdapterUnavailable, match="loading"):
        registry.compiled("a")
    with pytest.raises(AdapterUnavailable, match="loading"):
        registry.begin_load("a", "folder")
    with pytest.raises(AdapterUnavailable, match="loading"):
        registry.begin_unload("a", wait=True)


@pytest.mark.parametrize("keep", [True, False])
def test_a_first_load_that_fails(keep: bool) -> None:
    registry = AdapterRegistry(4)
    registry.begin_load("a", "folder")
    failed = registry.fail_load("a", "folder", ("one thing", "another"), keep=keep)
    assert (failed.state, failed.generation) == (AdapterState.FAILED, 0)
    if not keep:
        assert registry.list() == []
        return
    assert registry.list() == [failed]
    for call in (lambda: registry.resolve(AdapterRef("a")), lambda: registry.current("a")):
        with pytest.raises(AdapterUnavailable, match=r"failed: one thing$"):
            call()
    with pytest.raises(AdapterNotFound, match="generation 3"):
        registry.resolve(AdapterRef("a", generation=3))
    assert registry.begin_unload("a", wait=False) == failed
    assert registry.list() == []


def test_a_failed_one_can_be_loaded_again() -> None:
    registry = AdapterRegistry(4)
    registry.begin_load("a", "folder")
    registry.fail_load("a", "folder", ("broken",), keep=True)
    adapter = load(registry)
    assert registry.resolve(AdapterRef("a")) is adapter
    assert registry.get("a").problems == ()


def test_a_reload_that_fails_leaves_the_old_generation_serving() -> None:
    registry = AdapterRegistry(4)
    old = load(registry)
    registry.begin_load("a", "a")
    assert registry.resolve(AdapterRef("a")) is old
    assert registry.fail_load("a", "a", ("broken",), keep=True).state is AdapterState.FAILED
    assert registry.resolve(AdapterRef("a")) is old
    assert registry.get("a").state is AdapterState.READY
    assert gone(registry) == []


def test_both_generations_serve_until_the_old_one_is_let_go() -> None:
    registry = AdapterRegistry(4)
    old = load(registry)
    registry.resolve(AdapterRef("a"))
    new = load(registry)
    assert registry.resolve(AdapterRef("a")) is new
    assert registry.resolve(AdapterRef("a", generation=old.generation)) is old
    assert gone(registry) == []
    old.release()
    assert gone(registry) == []
    old.release()
    assert gone(registry) == [(old.generation, None)]
    assert gone(registry) == []
    with pytest.raises(AdapterNotFound, match=f"generation {old.generation} isn't loaded"):
        registry.resolve(AdapterRef("a", generation=old.generation))


def test_unloading_waits_for_pins_and_takes_no_more() -> None:
    registry = AdapterRegistry(4)
    adapter = load(registry)
    registry.resolve(AdapterRef("a"))
    info = registry.begin_unload("a", wait=True)
    assert (info.state, info.running_requests) == (AdapterState.UNLOADING, 1)
    for ref in (AdapterRef("a"), AdapterRef("a", generation=adapter.generation)):
        with pytest.raises(AdapterUnavailable, match="being unloaded"):
            registry.resolve(ref)
    with pytest.raises(AdapterUnavailable, match="unloading"):
        registry.begin_load("a", "a")
    with pytest.raises(AdapterUnavailable, match="unloading"):
        registry.begin_unload("a", wait=True)
    assert gone(registry) == []
    adapter.release()
    assert gone(registry) == [(adapter.generation, "a")]
    assert registry.list() == []
    assert gone(registry) == []


def test_unloading_without_waiting_refuses_while_it_is_in_use() -> None:
    registry = AdapterRegistry(4)
    adapter = load(registry)
    registry.resolve(AdapterRef("a"))
    with pytest.raises(AdapterUnavailable, match="in use by 1 running requests"):
        registry.begin_unload("a", wait=False)
    assert registry.get("a").state is AdapterState.READY
    adapter.release()
    assert registry.begin_unload("a", wait=False).state is AdapterState.UNLOADING


def test_neither_unloads_nor_loads_come_between_a_reload() -> None:
    registry = AdapterRegistry(4)
    old = load(registry)
    registry.begin_load("a", "a")
    for call in (lambda: registry.begin_unload("a", wait=True), lambda: registry.begin_load("a", "a")):
        with pytest.raises(AdapterUnavailable, match="loading"):
            call()
    new = finish(registry, "a")
    assert gone(registry) == [(old.generation, None)]
    registry.begin_unload("a", wait=True)
    assert gone(registry) == [(new.generation, "a")]


def test_only_so_many_adapters() -> None:
    registry = AdapterRegistry(2)
    load(registry, "a")
    registry.begin_load("b", "b")
    with pytest.raises(ResourceExhausted, match=r"2 adapters are loaded, the limit is 2 \(--max-adapters\)"):
        registry.begin_load("c", "c")
    load_again = registry.fail_load("b", "b", ("broken",), keep=True)
    assert load_again.state is AdapterState.FAILED
    load(registry, "c")
    # A failed one takes no place, and gets none for having been there.
    with pytest.raises(ResourceExhausted):
        registry.begin_load("b", "b")
    assert registry.get("b").state is AdapterState.FAILED
    load(registry, "a")
    registry.begin_unload("a", wait=True)
    registry.collect()
    load(registry, "b")


def test_the_list_is_by_name() -> None:
    registry = AdapterRegistry(9)
    for name in ("b", "c", "a"):
        load(registry, name)
    assert [info.name for info in registry.list()] == ["a", "b", "c"]


def test_no_pin_is_lost_between_threads() -> None:
    registry = AdapterRegistry(4)
    adapter = load(registry)

    def use() -> None:
        for _ in range(2000):
            registry.resolve(AdapterRef("a")).release()

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert adapter.pins == 0


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("json", " did you mean 'json-contact'?"),
        ("SENTIMENT", " did you mean 'sentiment'?"),
        ("sentimnt", " did you mean 'sentiment'?"),
        ("ticket-lroa", " did you mean 'ticket-lora' or 'ticket-qlora'?"),
        ("TICKET-LROA", " did you mean 'ticket-lora' or 'ticket-qlora'?"),
        ("something-else-altogether", ""),
    ],
)
def test_an_unknown_name_names_the_nearest(asked: str, says: str) -> None:
    registry = AdapterRegistry(8)
    for name in ("json-contact", "sentiment", "ticket-lora", "ticket-qlora"):
        registry.begin_load(name, name)
    for ask in (
        lambda: registry.get(asked),
        lambda: registry.resolve(AdapterRef(asked)),
        lambda: registry.begin_unload(asked, wait=True),
    ):
        with pytest.raises(AdapterNotFound) as caught:
            ask()
        assert str(caught.value) == (
            f"adapter {asked!r}: not registered;{says} ListAdapters (`polygraft adapters list`) shows all 4"
        )


def test_an_unknown_name_where_there_are_none() -> None:
    with pytest.raises(AdapterNotFound, match="not registered; no adapters are loaded"):
        AdapterRegistry(4).get("a")


def test_names_among_many_are_found_quickly() -> None:
    known = [f"customer-{n}" for n in range(10_000)]
    started = time.thread_time()
    assert nearest_names("customer-00017", [*known, "Customer-00017"])[0] == "Customer-00017"
    assert nearest_names("x" * 128, known) == []
    assert time.thread_time() - started < 1
