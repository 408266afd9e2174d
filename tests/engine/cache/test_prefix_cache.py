"""Prompts whose beginnings are in the cache: the same answers, less computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from polygraft.engine.engine import Engine
from polygraft_types.answers import Usage
from tests.engine.stores import change, copy_of, load
from tests.engines import greedy, make_engine, run_greedy

SYSTEM = [7 * i % 250 for i in range(50)]  # three blocks of 16, and two tokens more


def usage(engine: Engine, id: str, prompt: list[int], adapter: str | None, steps: int = 4) -> Usage:
    ((*_, last),) = engine.generate([greedy(id, prompt, adapter, steps)])
    assert last.finished is not None
    engine.check_integrity()
    return last.finished.usage


@pytest.mark.parametrize("adapter", [None, "lora", "prefix", "prompt"])
def test_a_shared_beginning_is_computed_once(llama: Path, llama_store: Path, adapter: str | None) -> None:
    engine = make_engine(llama, llama_store)
    plain = make_engine(llama, llama_store, prefix_caching=False)
    requests = [greedy(str(n), [*SYSTEM, 100 + n, n], adapter, 8) for n in range(3)]
    for request in requests:
        assert run_greedy(engine, [request]) == run_greedy(plain, [request])
    assert usage(engine, "again", [*SYSTEM, 99], adapter).cached_tokens == 48
    assert usage(plain, "again", [*SYSTEM, 99], adapter).cached_tokens == 0


def test_adapters_share_nothing(llama: Path, llama_store: Path) -> None:
    engine = make_engine(llama, llama_store)
    for name in (None, "lora", "lora-bias", "prefix", "prompt"):
        assert usage(engine, f"first {name}", SYSTEM, name).cached_tokens == 0
    for name in (None, "lora", "lora-bias", "prefix", "prompt"):
        assert usage(engine, f"second {name}", SYSTEM, name).cached_tokens == 48


def test_other_weights_under_the_same_name_find_nothing(
    llama: Path, llama_store: Path, tmp_path: Path
) -> None:
    store = copy_of(llama_store, tmp_path / "store", "lora")
    engine = make_engine(llama, store)
    usage(engine, "old", SYSTEM, "lora")
    change(store / "lora", 0.5)
    load(engine, "lora", reload=True)
    assert usage(engine, "new", SYSTEM, "lora").cached_tokens == 0


def test_the_next_turn_of_a_chat_finds_the_answer_too(llama: Path) -> None:
    engine = make_engine(llama)
    (answer,) = run_greedy(engine, [greedy("first", SYSTEM, None, 20)])
    # The last token that was sampled never ran.
    turn = usage(engine, "second", [*SYSTEM, *answer, 1, 2, 3], None)
    assert turn.cached_tokens == (50 + 19) // 16 * 16


def test_what_gave_way_is_computed_again(llama: Path) -> None:
    engine = make_engine(llama, kv_cache_bytes=12 * 16 * 3 * 2 * 2 * 16 * 4)
    assert engine.scheduler.pool.num_blocks == 12
    expected = run_greedy(engine, [greedy("first", SYSTEM, None, 4)])
    usage(engine, "long", [(3 * i) % 250 for i in range(180)], None)
    assert usage(engine, "second", SYSTEM, None).cached_tokens < 48
    assert run_greedy(engine, [greedy("third", SYSTEM, None, 4)]) == expected


def test_many_at_once_in_a_crowded_cache(llama: Path, llama_store: Path) -> None:
    engine = make_engine(
        llama, llama_store, kv_cache_bytes=220_000, max_num_seqs=9, max_num_batched_tokens=24
    )
    plain = make_engine(llama, llama_store, prefix_caching=False)
    names = [None, "lora", "prefix", "prompt"]
    requests = [greedy(f"{n}", [*SYSTEM[: 20 + n], n], names[n % 4], 12) for n in range(24)]
    assert run_greedy(engine, requests) == run_greedy(plain, requests)
